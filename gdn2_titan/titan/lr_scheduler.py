"""The learning rate after the last step of its schedule."""

__all__ = ["hold_last_rate"]


def hold_last_rate(schedulers, last_step):
    """Let LambdaLR schedulers keep the rate that they have at ``last_step``.

    Both generations of TorchTitan have a rate for steps up to there. Later ones, of a training that is longer than
    ``lr_scheduler.total_steps`` or that continues a checkpoint of more steps than its own, would get an AssertionError,
    a negative rate (linear, sqrt) or one that rises again (cosine).
    """
    for one in schedulers:
        one.lr_lambdas = [_held(factor, last_step) for factor in one.lr_lambdas]


def _held(factor, last_step):
    return lambda step: factor(min(step, last_step))
