"""Depthwise causal convolution of width 2 to 4 over packed documents: the public functions.

    pre_t = bias + sum_i weight[:, i] * x_{t - (W - 1) + i}        y_t = pre_t or silu(pre_t)

The past of a sequence's first tokens is its initial state or zero, that of a document's first tokens zero. Each
function ends in one operator of ``library``; the kernels are in ``windowed``, in PyTorch, and in ``triton``.
"""

import torch
from torch import Tensor

from ..checks import check_flags, check_state_indices
from . import library
from .arguments import QKV, QKV_STATES, check_state, checked_inputs, checked_qkv

__all__ = ["causal_conv1d", "causal_conv1d_", "causal_conv1d_qkv", "causal_conv1d_qkv_"]


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Depthwise causal convolution over time, y_t = act(bias + sum_i weight[:, i] * x_{t - (W - 1) + i}).

    Args:
        x: [B, T, D], float16, bfloat16, float32 or float64, B and T any, 0 too.
        weight: [D, W] with W 2, 3 or 4; column W - 1 multiplies the current token. Any of x's dtypes, not
            necessarily the same one.
        bias: [D] or None, any of x's dtypes.
        activation: None, "silu" or "swish" (the same).
        initial_state: [N, D, W - 1] in x's dtype, the last W - 1 inputs before each sequence, oldest first; None for
            zeros. N is B, or the number of packed sequences.
        output_final_state: whether to return the state at the end of each sequence.
        cu_seqlens: [N + 1] int32 or int64, bounds of sequences packed end to end along T, from 0 to T; B must be 1.
            Each starts from zeros or its own initial state. A sequence may be empty: its state passes through. The op
            reads the values on the host to check them; `resets` needs no such synchronisation.
        resets: [B, T] bool, True where a token begins a new document: no tap reaches a token before it, nor the
            initial state, and the final state holds zeros for tokens of earlier documents than the last token's.
        backend: "auto" (Triton on a GPU that it serves, otherwise PyTorch; on a GPU that is said in the log once: no
            Triton, older than sm_80, x, weight or bias in float64), "triton", "torch", or "batch_invariant" (on the
            CPU: a row's bits do not depend on what else is in the batch).

    Returns:
        y [B, T, D] in x's dtype, and final_state [N, D, W - 1] in x's dtype or None. Computed in float32, or float64
        if any of x, weight and bias is. Both are differentiable, once, in x, weight, bias and initial_state; each
        gradient has the dtype of its input.

    Raises:
        TypeError: an argument is no tensor or has a wrong dtype.
        ValueError: a wrong shape, device, activation or backend, a dtype or GPU that backend="triton" cannot serve, or
            cu_seqlens that do not run from 0 to T without falling.
    """
    check_flags(output_final_state=output_final_state)
    inputs = checked_inputs(x, weight, bias, activation, initial_state, cu_seqlens, resets, backend)
    y, final_state = library.differentiable_conv1d(*inputs)
    return y, final_state if output_final_state else None


def causal_conv1d_qkv(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor,
    activation: str | None = None, q_state: Tensor | None = None, k_state: Tensor | None = None,
    v_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:  # fmt: skip
    """:func:`causal_conv1d` of q, k and v, each with weights of its own: the same numbers, in one launch for the three
    on a GPU (two backward), without a copy that lays them side by side.

    Args:
        q, k, v: [B, T, D], each with a D of its own; one dtype for all.
        q_weight, k_weight, v_weight: [D, W] with each one's D, and one W; one dtype for all. No bias.
        q_state, k_state, v_state: initial states [N, D, W - 1] with each one's D, all three or none.
        The others: as in :func:`causal_conv1d`.

    Returns:
        q, k and v after it, each [B, T, D], and their final states [N, D, W - 1] as a tuple of three, or None.

    Raises:
        TypeError, ValueError: as :func:`causal_conv1d`, or where the three do not agree.
    """
    check_flags(output_final_state=output_final_state)
    tensors = q, k, v, q_weight, k_weight, v_weight
    states = q_state, k_state, v_state
    silu = checked_qkv(*tensors, activation, *states, cu_seqlens, resets, backend)[0].silu
    outputs = library.differentiable_conv1d_qkv(*tensors, silu, *states, cu_seqlens, resets, backend)
    return *outputs[:3], tuple(outputs[3:]) if output_final_state else None


def _refuse_gradients(name, instead, tensors):
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise RuntimeError(f"{name} overwrites its state and has no gradient; use {instead} or torch.no_grad()")


def causal_conv1d_(
    x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cu_seqlens: Tensor | None = None, resets: Tensor | None = None, backend: str = "auto",
    state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`causal_conv1d` that starts from ``state`` and leaves the final state there: a step of decoding that
    allocates nothing but its output, in one launch on a GPU.

    Args:
        state: [N, D, W - 1] in x's dtype, read and overwritten. N is B, or the number of packed sequences. Its entries
            [D, W - 1] are contiguous and may lie apart, as those of one tensor for q, k and v do. A sequence of no
            tokens keeps its state. With state_indices a pool of them, [blocks, D, W - 1].
        state_indices: int32 or int64 [N]: the block that each sequence reads and writes, no two the same one; -1 for a
            sequence that is left out, of which y is zero. Their values are not read on the host: on a GPU another
            number reads and writes memory that is not the pool's.
        The others: as in :func:`causal_conv1d`.

    Returns:
        y [B, T, D] in x's dtype.

    Raises:
        RuntimeError: a gradient would be needed; there is none through a state that is overwritten.
        TypeError, ValueError: naming the argument, what came and what is allowed. ``state`` is then as it was.
    """
    inputs = checked_inputs(x, weight, bias, activation, None, cu_seqlens, resets, backend)
    pool = state_indices is not None
    check_state("state", state, "x", inputs, pool)
    if pool:
        check_state_indices(state_indices, "x", x, inputs.num_sequences)
    _refuse_gradients("causal_conv1d_", "causal_conv1d", (x, weight, bias, state))
    return library.inplace_conv1d(*inputs._replace(initial_state=state), state_indices)


def causal_conv1d_qkv_(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, q_state: Tensor,
    k_state: Tensor, v_state: Tensor, activation: str | None = None, cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None, backend: str = "auto", state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`causal_conv1d_` of q, k and v, each with weights and a state of its own, in one launch for the three on a
    GPU.

    Args:
        q, k, v, q_weight, k_weight, v_weight: as in :func:`causal_conv1d_qkv`.
        q_state, k_state, v_state: [N, D, W - 1] with each one's D, or pools of them [blocks, D, W - 1], for which
            state_indices are the same. They may be slices of one tensor, along D.
        The others: as in :func:`causal_conv1d_`.

    Returns:
        q, k and v after it, each [B, T, D].

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`causal_conv1d_`, or where the three do not agree.
    """
    tensors, states = (q, k, v, q_weight, k_weight, v_weight), (q_state, k_state, v_state)
    parts = checked_qkv(*tensors, activation, None, None, None, cu_seqlens, resets, backend)
    pool = state_indices is not None
    for name, x_name, state, part in zip(QKV_STATES, QKV, states, parts, strict=True):
        check_state(name, state, x_name, part, pool)
    if pool:
        check_state_indices(state_indices, "q", q, parts[0].num_sequences)
    _refuse_gradients("causal_conv1d_qkv_", "causal_conv1d_qkv", (*tensors, *states))
    return library.inplace_conv1d_qkv(*tensors, parts[0].silu, *states, cu_seqlens, resets, backend, state_indices)
