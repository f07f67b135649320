"""Which modules make the stages of a pipeline, and whether a batch can be scheduled through them."""

import inspect
import math
import os
from typing import Any

from torch.distributed.pipelining import schedules
from torchtitan.distributed import pipeline_parallel

from .errors import ConfigError
from .settings import Settings
from .tasks import task_of, validation_lengths
from .torchtitan_version import IS_V02

__all__ = ["RUNS", "check_pipeline", "modules_of_stages", "rank_with_loss"]

_NAME = "generate_llm_fqn_per_model_part"
_shares = getattr(pipeline_parallel, _NAME if hasattr(pipeline_parallel, _NAME) else f"_{_NAME}")
# TorchTitan 0.3 hands microbatches over as torch 2.14's schedules take them.
RUNS: bool = IS_V02 or "arg_mbs" in inspect.signature(schedules.PipelineScheduleSingle.step).parameters
# The first and the last stage are on one rank.
V_SHAPED = (schedules.ScheduleZBVZeroBubble, schedules.ScheduleDualPipeV)
SPLIT_BACKWARD = (*V_SHAPED, schedules.ScheduleInterleavedZeroBubble)


def _number_of_stages(parallelism: Any, n_layers: int) -> int:
    """Stages over all ranks, as TorchTitan counts them."""
    if (layers := parallelism.pipeline_parallel_layers_per_stage) is not None:
        first = parallelism.pipeline_parallel_first_stage_less_layers
        return math.ceil((n_layers + first + parallelism.pipeline_parallel_last_stage_less_layers) / layers)
    schedule = schedules.get_schedule_class(parallelism.pipeline_parallel_schedule)
    return parallelism.pipeline_parallel_degree * (1 if issubclass(schedule, schedules.PipelineScheduleSingle) else 2)


def modules_of_stages(parallelism: Any, n_layers: int) -> list[list[str]]:
    """TorchTitan's shares of the model, or the user's, with the head under its name here."""
    stages = parallelism.module_fqns_per_model_part
    if stages is None:
        stages = _shares(
            _number_of_stages(parallelism, n_layers), n_layers, parallelism.pipeline_parallel_first_stage_less_layers,
            parallelism.pipeline_parallel_last_stage_less_layers,
        )  # fmt: skip
    return [["lm_head" if name == "output" else name for name in stage] for stage in stages]


def rank_with_loss(parallelism: Any, processes: int) -> int:
    """The first rank of the last stage, which alone knows the loss; a V-shaped schedule ends where it began."""
    degree = parallelism.pipeline_parallel_degree
    if issubclass(schedules.get_schedule_class(parallelism.pipeline_parallel_schedule), V_SHAPED):
        return 0
    return processes // degree * (degree - 1)


def check_pipeline(settings: Settings, n_layers: int) -> None:
    """Raise ConfigError unless the model can be cut, and the batch scheduled, as [parallelism] says."""
    parallelism, training = settings.parallelism, settings.training
    degree, microbatch = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_microbatch_size
    csv, name = parallelism.pipeline_parallel_schedule_csv, parallelism.pipeline_parallel_schedule
    if csv and not os.path.isfile(csv):
        raise ConfigError(f"parallelism.pipeline_parallel_schedule_csv is {csv!r}; it must be a readable file")
    schedule = schedules.get_schedule_class(name)
    if training.local_batch_size % microbatch:
        raise ConfigError(f"parallelism.pipeline_parallel_microbatch_size is {microbatch}; it must divide "
                          f"training.local_batch_size = {training.local_batch_size}")  # fmt: skip
    microbatches = training.local_batch_size // microbatch
    stages = parallelism.module_fqns_per_model_part
    count = len(stages) if stages is not None else _number_of_stages(parallelism, n_layers)
    single = issubclass(schedule, schedules.PipelineScheduleSingle)
    if count != degree if single else (count % degree or count < 2 * degree):
        allowed = f"{degree}, one for each rank" if single else f"a multiple of {degree}, at least two for each rank"
        field = "module_fqns_per_model_part" if stages is not None else "pipeline_parallel_layers_per_stage"
        raise ConfigError(f"parallelism.{field} makes {count} stages; with schedule {name!r} they must be {allowed}")
    try:
        modules = modules_of_stages(parallelism, n_layers)
    except ValueError as error:
        raise ConfigError(
            f"parallelism.pipeline_parallel_degree is {degree}; {n_layers} layers do not fill {count} stages ({error})"
        ) from error
    if stages is not None:
        _check_modules(modules, n_layers, stages)
    batch = f"training.local_batch_size is {training.local_batch_size}, or {microbatches} microbatches of {microbatch}"
    if microbatches < count and issubclass(schedule, (schedules.Schedule1F1B, schedules.ScheduleDualPipeV)):
        raise ConfigError(f"{batch}; schedule {name!r} wants at least one for each of {count} stages")
    if not single and microbatches % max(1, microbatches // degree):
        raise ConfigError(
            f"{batch}; schedule {name!r} wants a multiple of parallelism.pipeline_parallel_degree = {degree}"
        )
    if issubclass(schedule, SPLIT_BACKWARD):
        because = f"with parallelism.pipeline_parallel_schedule = {name!r}, which cuts each backward in two, it must be"
        if settings.compiles("model"):
            raise ConfigError(f"compile.enable is true; {because} false, or compile.components without 'model'")
        checkpointing = settings.activation_checkpoint
        if checkpointing.mode == "selective" and checkpointing.selective_ac_option == "op":
            raise ConfigError(f"activation_checkpoint.selective_ac_option is 'op'; {because} a number of layers")
    validation = settings.validation
    if validation.enable and issubclass(schedule, V_SHAPED):
        raise ConfigError(f"validation.enable is true; with parallelism.pipeline_parallel_schedule = {name!r} it must "
                          "be false: torch runs that schedule's backward in a validation too")  # fmt: skip
    if validation.enable:
        _check_shapes(settings)
    task = task_of(settings)
    if IS_V02 and task is not None and task.answers(training.seq_len) is None:
        raise ConfigError(
            f"parallelism.pipeline_parallel_degree is {degree}; with training.dataset = {task.name!r} it must be 1 "
            "unless all sequences have the same number of answers, by which a pipeline's gradient is divided"
        )


def _check_modules(modules: list[list[str]], n_layers: int, said: list[list[str]]) -> None:
    """TorchTitan trains without a module that no stage has, and passes over a name that no module has."""
    order = ["tok_embeddings", *(f"layers.{layer}" for layer in range(n_layers)), "norm", "lm_head"]
    place = {name: i for i, name in enumerate(order)}
    if [name for stage in modules for name in sorted(stage, key=lambda name: place.get(name, -1))] != order:
        raise ConfigError(f"parallelism.module_fqns_per_model_part is {said!r}; it must have each of "
                          f"{', '.join(order)} once, in this order of stages")  # fmt: skip


def _check_shapes(settings: Settings) -> None:
    """The stages' buffers have the shape of a training batch; under TorchTitan 0.3, torch makes them anew for a
    validation, in the shape of its first batch."""
    training, validation, lengths = settings.training, settings.validation, validation_lengths(settings)
    like, length = "training.seq_len", training.seq_len
    if not IS_V02:
        like, length = f"the first of {lengths[0][0]}", lengths[0][1]
    wanted = [(*one, like, length) for one in lengths]
    batches = validation.local_batch_size, "training.local_batch_size", training.local_batch_size
    for name, value, other, expected in [("validation.local_batch_size", *batches), *wanted]:
        if value != expected:
            raise ConfigError(f"{name} is {value}; under pipeline parallelism it must be {other} = {expected}")
