"""The decoder's linear layers in float8 or MXFP8, through torchao: which of them, and their share of the work."""

import dataclasses
import importlib.util
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gdn2_titan.models.flops import mixing_flops

__all__ = ["EXCLUDE", "FLOAT8_RECIPES", "MXFP8_RECIPES", "SMALLEST_SIDE", "apply_float8", "float8_share", "has_mxfp8"]

# torchao's names. The last of each kind computes the weights' gradients in high precision.
FLOAT8_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
MXFP8_RECIPES = ("mxfp8_rceil", "mxfp8_rceil_wgrad_with_hp")
# Parts of names. The head's logits and the low-rank factors of decay and output gate stay as they are: little work, and
# an error there is an error of every token's loss or of what the memory forgets. An MLP's gate_proj is no such factor.
# Of Mamba-2 and Mamba-3 those to the decay and to keys, queries and angles, which all heads share.
EXCLUDE = (
    "lm_head", "mixer.decay_low_proj", "mixer.decay_proj", "mixer.gate_low_proj", "mixer.gate_proj", "mixer.dt_proj",
    "mixer.bc_proj", "mixer.a_proj", "mixer.trap_proj", "mixer.angle_proj",
)  # fmt: skip
# Below a matrix tile nothing is gained. Scalar gates, one output per head, are below it.
SMALLEST_SIDE = 128


def has_mxfp8() -> bool:
    """Whether this version of torchao has MXFP8 linear layers; 0.18 has."""
    try:
        return importlib.util.find_spec("torchao.prototype.moe_training.mxfp8_linear") is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def apply_float8(
    model: nn.Module, recipe: str = "tensorwise", *, emulate: bool = False, fsdp_all_gather: bool = False,
    exclude: Iterable[str] = EXCLUDE, smallest_side: int = SMALLEST_SIDE,
) -> list[str]:  # fmt: skip
    """Convert large linear layers of a model in place and return their names; state-dict keys stay as they are.

    Do this first: before activation checkpointing, ``apply_compile`` and ``apply_fsdp``. Needs torchao.

    Args:
        recipe: of FLOAT8_RECIPES (sm_89 and newer) or MXFP8_RECIPES (sm_100 and newer).
        emulate: round to the format and multiply in high precision: slow, but on any device.
        fsdp_all_gather: FSDP2 gathers the weights in float8; "tensorwise" only. Call
            ``torchao.float8.precompute_float8_dynamic_scale_for_fsdp(model)`` after each optimizer step to find all
            scales in one reduction.
        exclude: a linear layer stays if its name contains one of these.
        smallest_side: it stays if a side is shorter; also if a side is no multiple of 16 (MXFP8: 32).

    Raises:
        ValueError: unknown recipe, or one that cannot be gathered in float8.
        ImportError: torchao is missing, or this version of it has no MXFP8 linear layer.
    """
    if recipe not in FLOAT8_RECIPES + MXFP8_RECIPES:
        raise ValueError(f"recipe is {recipe!r}; it must be one of {', '.join(FLOAT8_RECIPES + MXFP8_RECIPES)}")
    if fsdp_all_gather and recipe != "tensorwise":
        raise ValueError(f"fsdp_all_gather is True; with recipe {recipe!r} it must be False, only 'tensorwise' has it")
    if recipe in MXFP8_RECIPES and not has_mxfp8():
        raise ImportError(f"recipe is {recipe!r}; it needs a torchao with MXFP8 linear layers, as 0.18 has")
    multiple = 32 if recipe in MXFP8_RECIPES else 16
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = [
        name for name, linear in linears.items()
        if all(side >= smallest_side and side % multiple == 0 for side in linear.weight.shape)
        and not any(part in name for part in exclude)
    ]  # fmt: skip
    if recipe in MXFP8_RECIPES:
        _to_mxfp8(model, names, emulate, wgrad_with_hp=recipe.endswith("wgrad_with_hp"))
    else:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = dataclasses.replace(
            Float8LinearConfig.from_recipe_name(recipe), emulate=emulate, enable_fsdp_float8_all_gather=fsdp_all_gather
        )
        convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in names)
        if fsdp_all_gather:
            for name in names:
                model.get_submodule(name).register_state_dict_post_hook(_unwrap)
    return names


@torch.no_grad()
def _unwrap(module, state_dict, prefix, _):
    """Puts the plain weight, on the same memory, in the place of torchao's wrapper, which only torchao could load."""
    weight = state_dict[f"{prefix}weight"]
    if isinstance(weight, DTensor):
        state_dict[f"{prefix}weight"] = DTensor.from_local(
            weight.to_local()._tensor, weight.device_mesh, weight.placements, run_check=False,
            shape=weight.shape, stride=weight.stride(),
        )  # fmt: skip
    else:
        state_dict[f"{prefix}weight"] = weight._tensor.detach()


def _to_mxfp8(model, names, emulate, wgrad_with_hp):
    from torchao.prototype.moe_training.mxfp8_linear import MXFP8Linear
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    kernels = KernelPreference.EMULATED if emulate else KernelPreference.AUTO
    options = {"bias": False, "device": "meta", "kernel_preference": kernels, "wgrad_with_hp": wgrad_with_hp}
    for name in names:
        old = model.get_submodule(name)
        new = MXFP8Linear(old.in_features, old.out_features, **options)
        new.weight, new.bias = old.weight, old.bias
        model.set_submodule(name, new)


def float8_share(model: nn.Module, names: Iterable[str], seq_len: int) -> tuple[float, float]:
    """The named linear layers' share of a ``GDN2Model``'s forward FLOPs: (of all linear layers', of all).

    Linear layers are all matrices that multiply, the output head among them. "All" adds what the mixers multiply by
    themselves: the op, and attention at ``seq_len``.
    """
    flops = {n: 2 * module.weight.numel() for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    converted, linear = sum(flops[name] for name in names), sum(flops.values())
    mixing = sum(mixing_flops(model.args, int(layer), seq_len) for layer in model.layers)
    return converted / linear, converted / (linear + mixing)
