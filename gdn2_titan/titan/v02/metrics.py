"""TorchTitan 0.2.2's metrics with ours."""

from torchtitan.components.metrics import MetricsProcessor

from ..metrics import GateMetrics

__all__ = ["GDN2MetricsProcessor", "build_metrics_processor"]


class GDN2MetricsProcessor(GateMetrics, MetricsProcessor):
    def __init__(self, job_config, parallel_dims, model_args, tag=None):
        self.watch(job_config, model_args)
        super().__init__(job_config, parallel_dims, tag)

    def should_log(self, step):
        # The one thing that the trainer asks in every step, after its forward.
        self.finish(step)
        return super().should_log(step)

    def log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=None):
        # TorchTitan has every context-parallel rank count whole sequences, of whose loss it has a share.
        shares = self.parallel_dims.cp
        if extra_metrics and "n_tokens_seen" in extra_metrics:
            extra_metrics = extra_metrics | {"n_tokens_seen": extra_metrics["n_tokens_seen"] // shares}
        super().log(step, global_avg_loss, global_max_loss * shares, grad_norm, extra_metrics)
        self.flush()


def build_metrics_processor(job_config, parallel_dims, model_args, tag=None):
    return GDN2MetricsProcessor(job_config, parallel_dims, model_args, tag)
