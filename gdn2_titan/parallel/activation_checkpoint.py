"""Activation checkpointing for the decoder: which blocks compute their activations again in backward, and from what."""

import functools

import torch
import torch._functorch.config
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import gdn2_titan.ops  # noqa: F401 - registers the operators that are named below
from gdn2_titan.models.checks import check_count
from gdn2_titan.ops.checks import check_choice

__all__ = ["SAVED_OPS", "apply_activation_checkpoint", "apply_memory_budget"]

# What selective checkpointing by op keeps, because it costs the most to redo: matrix products and mixers. The short
# convolution is not here: three of them take under 1% of a layer's forward (the mixer 24%; CPU, 768 wide, 1,024
# tokens), and their outputs are as many bytes as the projections they read, which are kept.
SAVED_OPS = {
    torch.ops.gdn2_titan.chunk_gdn2.default,
    torch.ops.gdn2_titan.chunk_gdn2_saving.default,  # the same on a GPU
    torch.ops.gdn2_titan.segmented_gdn2.default,  # a long sequence in segments on one device
    # Under context parallelism the mixer, and what it receives from other ranks: nothing is sent twice.
    torch.ops.gdn2_titan.segment_gdn2.default,
    torch.ops._c10d_functional.all_gather_into_tensor_coalesced.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, torch._higher_order_ops.flex_attention,
    # The greatest magnitude, from which float8 takes its scale: one number that costs a pass over the tensor.
    torch.ops.aten.max.default, torch.ops._c10d_functional.reduce_scatter_tensor.default,
}  # fmt: skip


def _policy(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpoint(model: nn.Module, mode: str = "full", every: int = 1) -> None:
    """Wrap blocks of a ``GDN2Model`` in place, before compiling and sharding.

    State-dict keys stay as they are; the names of parameters gain torch's ``_checkpoint_wrapped_module.``.

    Args:
        mode: "full" keeps a block's input alone; "op" also what SAVED_OPS gave, so that backward runs no mixer and no
            matrix product of the forward again.
        every: of so many blocks in a row, the last is wrapped: 1 for all, 2 for every second.

    Raises:
        ValueError: naming the argument, what came and what is allowed.
    """
    check_choice("mode", mode, ("full", "op"))
    check_count("every", every)
    options = {"preserve_rng_state": False}  # the model draws no random numbers
    if mode == "op":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for name, block in list(model.layers.items())[every - 1 :: every]:
        model.layers[name] = checkpoint_wrapper(block, **options)


def apply_memory_budget(budget: float) -> None:
    """Let the compiler choose what to keep, in every graph that it compiles from now on in this process.

    budget: between 0, which keeps graph inputs alone, and 1, which is the compiler's own choice; a block that is
    compiled by itself has such a budget for itself. The costs it weighs are those of FlopCounterMode.

    Raises:
        ValueError: naming the argument, what came and what is allowed.
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"budget is {budget!r}; it must be between 0 and 1")
    torch._functorch.config.activation_memory_budget = budget
    # Without this the compiler takes operators that it does not know for free: it would run the mixer again first.
    torch._functorch.config.is_non_builtin_to_include = True
