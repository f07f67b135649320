"""TorchTitan 0.2.2's learning rate, with the state that TorchTitan 0.3 keeps of it in checkpoints."""

from torchtitan.components import lr_scheduler

from ..lr_scheduler import hold_last_rate

__all__ = ["build_lr_schedulers"]


class LRSchedulers(lr_scheduler.LRSchedulersContainer):
    """The number of steps is all of the state: the rest follows from the config, and TorchTitan 0.3 saves no more."""

    def __init__(self, schedulers):
        self.schedulers = schedulers

    def state_dict(self):
        return {"last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state_dict):
        steps = state_dict["last_epoch"]
        for one in self.schedulers:
            one.last_epoch, one._step_count = steps, steps + 1
            one._last_lr = [lr * factor(steps) for lr, factor in zip(one.base_lrs, one.lr_lambdas, strict=True)]


def build_lr_schedulers(optimizers, lr_scheduler_config, training_steps):
    """TorchTitan's ``build_lr_schedulers_fn``."""
    built = LRSchedulers(lr_scheduler.build_lr_schedulers(optimizers, lr_scheduler_config, training_steps).schedulers)
    hold_last_rate(built.schedulers, lr_scheduler_config.total_steps or training_steps)
    return built
