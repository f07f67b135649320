"""Our converters ``quantize.linear.float8`` and ``quantize.linear.mx`` for this model.

Stock ones fail where this plan works: the first ignores ``emulate`` beside a recipe and refuses a recipe beside the
float8 all-gather, the second needs a torchao of another generation. Other models in the same process keep them.
"""

import dataclasses
from typing import Any

import torch
import torch._inductor.config
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import has_cuda_capability, has_rocm_capability

from gdn2_titan.parallel import apply_float8, float8_share
from gdn2_titan.parallel.float8 import FLOAT8_RECIPES, MXFP8_RECIPES, has_mxfp8

from .errors import ConfigError
from .settings import Float8Linear, MXLinear, Settings
from .torchtitan_version import IS_V02

__all__ = ["NAMES", "LinearConverter", "check_float8"]

FLOAT8, MX = NAMES = ("quantize.linear.float8", "quantize.linear.mx")


def _section(settings, name):
    """The converter's section; a fork's own job config has no defaults of ours, where an empty filter says nothing."""
    quantize = settings.quantize.linear
    found, ours = (quantize.float8, Float8Linear) if name == FLOAT8 else (quantize.mx, MXLinear)
    if hasattr(found, "smallest_side"):
        return found
    said = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    changed = {n: v for n, v in said.items() if v != getattr(type(found)(), n)}
    return ours(**changed)


def _recipe(linear: Any, name: str) -> str:
    return linear.recipe_name or FLOAT8_RECIPES[0] if name == FLOAT8 else linear.recipe_name


class LinearConverter:
    """TorchTitan's ModelConverter, of ``gdn2_titan.parallel.apply_float8``."""

    def __init__(self, settings: Settings, parallel_dims: ParallelDims, name: str) -> None:
        linear = _section(settings, name)
        self.recipe = _recipe(linear, name)
        self.seq_len = settings.training.seq_len
        gathered = name == FLOAT8 and linear.enable_fsdp_float8_all_gather and parallel_dims.fsdp_enabled
        self.precompute = gathered and linear.precompute_float8_dynamic_scale_for_fsdp
        self.options = {
            "emulate": linear.emulate, "fsdp_all_gather": gathered, "exclude": linear.filter_fqns,
            "smallest_side": linear.smallest_side,
        }  # fmt: skip
        if self.recipe == "rowwise":
            # Without it a compiled backward may round a recomputed activation to another float8 number, and end in
            # NaN (github.com/pytorch/pytorch/issues/150859).
            torch._inductor.config.emulate_precision_casts = True

    def convert(self, model: torch.nn.Module) -> None:
        total = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
        names = apply_float8(model, self.recipe, **self.options)
        of_linear, of_all = float8_share(model, names, self.seq_len)
        how = self.recipe + (", emulated" if self.options["emulate"] else "")
        gathered = "; weights are gathered in float8" if self.options["fsdp_all_gather"] else ""
        logger.info(f"Converted {len(names)} of {total} linear layers ({how}): {of_linear:.1%} of the FLOPs in linear "
                    f"layers, {of_all:.1%} of all forward FLOPs{gathered}")  # fmt: skip

    def post_optimizer_hook(self, model: torch.nn.Module | list[torch.nn.Module]) -> None:
        if self.precompute:
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

            for part in model if isinstance(model, list) else [model]:
                precompute_float8_dynamic_scale_for_fsdp(part)


def _known_converters() -> list[str]:
    if not IS_V02:
        return list(NAMES)
    from torchtitan.protocols.model_converter import _registry_model_converter_cls as known

    return [name for name in known if "grouped_mm" not in name]


def check_float8(settings: Settings) -> None:
    """Raise ConfigError for converters that cannot be used. Converts nothing."""
    converters, allowed = settings.model.converters, _known_converters()
    for name in converters:
        if name not in allowed:
            raise ConfigError(f"model.converters has {name!r}; it must be a list of: {', '.join(allowed)}")
    if set(NAMES) <= set(converters):
        raise ConfigError(f"model.converters has {FLOAT8!r} and {MX!r}; it must have only one of them")
    for name in set(NAMES) & set(converters):
        _check_converter(settings, name, _section(settings, name))


def _check_converter(settings: Settings, name: str, linear: Any) -> None:
    recipe, recipes = _recipe(linear, name), FLOAT8_RECIPES if name == FLOAT8 else MXFP8_RECIPES
    if recipe not in recipes:
        raise ConfigError(f"{name}.recipe_name is {recipe!r}; it must be one of {', '.join(recipes)}")
    if "auto_filter_small_kn" in linear.filter_fqns:
        raise ConfigError(f"{name}.filter_fqns has 'auto_filter_small_kn'; for this model set {name}.smallest_side")
    if name == FLOAT8 and linear.enable_fsdp_float8_all_gather and recipe != "tensorwise":
        raise ConfigError(f"{name}.enable_fsdp_float8_all_gather is true; with recipe_name {recipe!r} it must be "
                          "false, only 'tensorwise' has it")  # fmt: skip
    if name == FLOAT8 and linear.precompute_float8_dynamic_scale_for_fsdp and not linear.enable_fsdp_float8_all_gather:
        raise ConfigError(f"{name}.precompute_float8_dynamic_scale_for_fsdp is true; it must be false, or "
                          "enable_fsdp_float8_all_gather true as well")  # fmt: skip
    if name == MX and linear.mxfp8_dim1_cast_kernel_choice != MXLinear.mxfp8_dim1_cast_kernel_choice:
        raise ConfigError(f"{name}.mxfp8_dim1_cast_kernel_choice is {linear.mxfp8_dim1_cast_kernel_choice!r}; it must "
                          "be left out, torchao chooses the kernel itself")  # fmt: skip
    if name == MX and not has_mxfp8():
        raise ConfigError(f"model.converters has {name!r}; it needs a torchao with MXFP8 linear layers, as 0.18 has")
    _check_hardware(settings, name, linear)


def _check_hardware(settings: Settings, name: str, linear: Any) -> None:
    able = has_cuda_capability(8, 9) if name == FLOAT8 else has_cuda_capability(10, 0) or has_rocm_capability(9, 5)
    if not able and not linear.emulate:
        wanted = "sm_89 or newer" if name == FLOAT8 else "sm_100 or newer, or gfx950"
        raise ConfigError(f"{name}.emulate is false; on a machine without a GPU of {wanted} it must be true")
    high_precision = _recipe(linear, name).endswith(("gw_hp", "wgrad_with_hp"))
    if high_precision or (name == FLOAT8 and linear.emulate):
        return
    training, parallelism, multiple = settings.training, settings.parallelism, 16 if name == FLOAT8 else 32
    pipelined = parallelism.pipeline_parallel_degree > 1
    batch = parallelism.pipeline_parallel_microbatch_size if pipelined else training.local_batch_size
    tokens = batch * training.seq_len // parallelism.context_parallel_degree
    if tokens % multiple:
        raise ConfigError(f"training.seq_len is {training.seq_len}, which gives microbatches of {tokens} tokens on "
                          f"each rank; with {name} they must be multiples of {multiple}")  # fmt: skip
