"""TorchTitan's validation loop over this package's data."""

from torchtitan.components.validate import Validator
from torchtitan.distributed.context_parallel import prepare_context_parallel_input

from ..validator import TaskValidation

__all__ = ["GDN2Validator", "build_validator"]


class _DealtOut:
    """ParallelDims as they are once sequences are dealt out: a rank with a part of a sequence is one with data of its
    own. The stock validator counts tokens after that, and would add up the ranks' means of their parts."""

    cp_enabled = False

    def __init__(self, parallel_dims):
        self._dims = parallel_dims
        self.dp_enabled = parallel_dims.dp_cp_enabled

    def get_mesh(self, name):
        return self._dims.get_mesh("loss" if name == "batch" else name)

    def __getattr__(self, name):
        return getattr(self._dims, name)


class GDN2Validator(TaskValidation, Validator):
    def __init__(
        self,
        job_config,
        dp_world_size,
        dp_rank,
        tokenizer,
        parallel_dims,
        loss_fn,
        validation_context,
        maybe_enable_amp,
        metrics_processor,
        pp_schedule=None,
        pp_has_first_stage=None,
        pp_has_last_stage=None,
    ):
        self.job_config = job_config
        self.tokenizer = tokenizer
        self.parallel_dims = _DealtOut(parallel_dims)
        self.loss_fn = loss_fn
        self.validation_context = validation_context
        self.maybe_enable_amp = maybe_enable_amp
        self.metrics_processor = metrics_processor
        self.pp_schedule = pp_schedule
        self.pp_has_first_stage = pp_has_first_stage
        self.pp_has_last_stage = pp_has_last_stage
        self.prepare(parallel_dims, dp_world_size, dp_rank, tokenizer, job_config)

    def post_dataloading_process(self, input_dict, labels, model_parts):
        # The stock one leaves the resets out where a model's masks are not asked for by type.
        extra_inputs = {name: x for name, x in input_dict.items() if name != "input"}
        inputs = input_dict["input"]
        extra = {"attention_masks": model_parts[0].get_attention_masks(inputs, self.tokenizer, extra_inputs)}
        if self._cp_mesh is not None:
            balancer = self.job_config.parallelism.context_parallel_load_balancer
            inputs, labels, extra = prepare_context_parallel_input(
                inputs, labels, extra, self._cp_mesh, inputs.device, balancer
            )
        return inputs, labels, extra_inputs, extra


def build_validator(**kwargs):
    return GDN2Validator(**kwargs)
