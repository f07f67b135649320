"""The public functions: signatures and docstrings. Each ends in one operator of ``library``.

A signature repeats the others' parameters one by one: that is what editors, ``help`` and positional calls go by.
"""

import torch
from torch import Tensor

from ..checks import check_flags
from ..elementwise import BATCH_INVARIANT
from . import library, reference
from .arguments import GDN2Inputs, GDN2Options, check_arguments, check_state
from .segmented import segments_of, split_gdn2

__all__ = ["chunk_gdn2", "fused_recurrent_gdn2", "recurrent_gdn2", "recurrent_gdn2_"]


def _call(op, inputs, options, output_final_state, num_segments=1):
    check_flags(output_final_state=output_final_state)
    options = check_arguments(inputs, options, reference=True)
    if options.backend == "reference":
        o, final_state = reference.recurrent(inputs, options)
        return o, final_state if output_final_state else None
    segments = segments_of(inputs.q, inputs.v, num_segments, options.backend)
    if options.backend == BATCH_INVARIANT:
        if segments > 1:
            raise ValueError(f"num_segments is {num_segments}; with backend={options.backend!r} it must be 1 or 'auto'")
        op = library.differentiable_recurrent_gdn2
    if segments > 1 and inputs.cu_seqlens is None:
        o, final_state = split_gdn2(op, segments, inputs, options)
    else:
        o, final_state = op(*inputs, *options)
    return o, final_state if output_final_state else None


def chunk_gdn2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor | None, w: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
    use_sigmoid_in_kernel: bool = False, erase_scale: float = 1.0, cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None, backend: str = "auto", num_segments: int | str = "auto",
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gated DeltaNet-2 over whole sequences, chunk by chunk: for training and prefill.

    Per head, with state S [K, V] (arXiv 2605.22791; the recurrence in ``reference``),

        S_t = (I - k_t (b_t * k_t)^T) Diag(exp(g_t)) S_{t-1} + k_t (w_t * v_t)^T        o_t = scale * S_t^T q_t

    Args:
        q, k: query and key [B, T, H, K]; float16, bfloat16, float32 or float64. Keys should have length 1. B and T may
            be 0.
        v: value [B, T, HV, V], q's dtype. HV is a multiple of H: value head j reads key head j // (HV // H).
        g: natural-log decay per key channel [B, T, H, K], <= 0, -inf allowed; float32 recommended.
        b: erase gate [B, T, H, K] in [0, 1], or [0, 2] for negative eigenvalues; None: nothing is erased (gated linear
            attention) and nothing is solved for; erase_scale must then be 1.0.
        w: write gate [B, T, HV, V] in [0, 1].
        scale: of the output; None means K ** -0.5.
        initial_state: [N, HV, K, V]; None means zeros. N is B, or the number of packed sequences.
        output_final_state: return the final state too.
        use_qk_l2norm_in_kernel: use q / sqrt(sum(q^2) + 1e-6), and k likewise.
        use_gate_in_kernel: g is raw, and the decay is -exp(A_log[h]) * softplus(g + dt_bias[h, :]).
        A_log: [H], with use_gate_in_kernel; with lower_bound it may be None, which stands for zeros.
        dt_bias: [H, K] or [H * K] or None, with use_gate_in_kernel.
        use_sigmoid_in_kernel: b and w are logits, and the gates are erase_scale * sigmoid(b) and sigmoid(w).
        erase_scale: 1.0, or 2.0 to allow negative eigenvalues, with use_sigmoid_in_kernel.
        cu_seqlens: int32 or int64 [N + 1], from 0 to T: B is 1 and sequences are packed end to end; the state starts
            afresh, or at initial_state[n], in each. Empty sequences are allowed.
        resets: bool [B, T], True where a token begins a new document: the state before it is forgotten, the initial
            state included. Fixed shapes, so it compiles once and shards with the sequence.
        backend: "auto" (Triton on a GPU that it serves, otherwise chunked PyTorch; on a GPU that is said in the log
            once: no Triton, older than sm_80, float64, heads above 256), "triton", "torch", "reference" (token by
            token, autograd), or "batch_invariant" (token by token on the CPU: bit for bit the same for a sequence
            whatever else is in the batch, and however it is cut in calls; the backward is chunked).
        num_segments: "auto" cuts a long sequence of few heads in segments that run side by side, on a GPU that the
            heads do not fill, and never on a CPU; a number says into how many. For any T: what is left over when T is
            cut evenly follows the segments. Costs K more value columns, and more is saved for backward (see below).
            Has no effect with cu_seqlens or backend "reference"; with "batch_invariant" it must be 1 or "auto".
        lower_bound: a number less than 0, with use_gate_in_kernel: the decay is then bounded, lower_bound *
            sigmoid(exp(A_log[h]) * (g + dt_bias[h, :])).

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] (float64 for float64 inputs, float32 otherwise)
        or None. Both carry gradients to every tensor input. State, decay and sums are kept in that same precision.
        Saved for the backward pass are the inputs, and by the Triton kernels two [H, 64, 64] of q's dtype (one if b is
        None) for each 64 tokens; with more than one segment also a tensor like q, and for each segment the state it is
        entered with [HV, K, V] and its transition [H, K, K].

    The tensors may be DTensors, all of them: sharded on B (N, for the states), or on H and HV where the mesh divides H,
    the op communicates nothing and returns the same sharding.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
    """
    inputs = GDN2Inputs(q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets)
    options = GDN2Options(
        scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, use_sigmoid_in_kernel, erase_scale, backend, lower_bound
    )
    return _call(library.differentiable_chunk_gdn2, inputs, options, output_final_state, num_segments)


def recurrent_gdn2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor | None, w: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
    use_sigmoid_in_kernel: bool = False, erase_scale: float = 1.0, cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None, backend: str = "auto", lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gated DeltaNet-2 one token after the other: for decoding. Arguments, returns and errors of :func:`chunk_gdn2`.

    Gradients flow here too, by the chunked backward.
    """
    inputs = GDN2Inputs(q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets)
    options = GDN2Options(
        scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, use_sigmoid_in_kernel, erase_scale, backend, lower_bound
    )
    return _call(library.differentiable_recurrent_gdn2, inputs, options, output_final_state)


fused_recurrent_gdn2 = recurrent_gdn2


def recurrent_gdn2_(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor | None, w: Tensor, state: Tensor, scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False, A_log: Tensor | None = None,
    dt_bias: Tensor | None = None, use_sigmoid_in_kernel: bool = False, erase_scale: float = 1.0,
    cu_seqlens: Tensor | None = None, resets: Tensor | None = None, backend: str = "auto",
    state_indices: Tensor | None = None, lower_bound: float | None = None,
) -> Tensor:  # fmt: skip
    """:func:`recurrent_gdn2` that starts from ``state`` and leaves the final state there: a step of decoding that
    allocates nothing but its output.

    Args:
        state: [N, HV, K, V], contiguous, float32 (float64 for float64 inputs), read and overwritten. N is B, or the
            number of packed sequences. A sequence of no tokens keeps its state. With state_indices a pool of them,
            [blocks, HV, K, V], whose blocks are contiguous and may lie apart.
        state_indices: int32 or int64 [N]: the block that each sequence reads and writes, no two the same one; -1 for a
            sequence that is left out, of which o is zero. Their values are not read on the host: on a GPU another
            number reads and writes memory that is not the pool's.
        The others: as in :func:`chunk_gdn2`.

    Returns:
        o [B, T, HV, V] in v's dtype.

    Raises:
        RuntimeError: a gradient would be needed; there is none through a state that is overwritten.
        TypeError, ValueError: naming the argument, what came and what is allowed. ``state`` is then as it was.
    """
    inputs = GDN2Inputs(q, k, v, g, b, w, A_log, dt_bias, None, cu_seqlens, resets)
    options = GDN2Options(
        scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, use_sigmoid_in_kernel, erase_scale, backend, lower_bound
    )
    options = check_arguments(inputs, options, reference=True)
    check_state(state, inputs, state_indices)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, state)):
        raise RuntimeError(
            "recurrent_gdn2_ overwrites its state and has no gradient; use recurrent_gdn2 or torch.no_grad()"
        )
    if options.backend == "reference":
        return reference.update(inputs, options, state, state_indices)
    return library.inplace_recurrent_gdn2(
        *inputs[:8], state, cu_seqlens, resets, *options[:-1], state_indices, options.lower_bound
    )
