"""The public functions: defaults, validation, docstrings. Each ends in one operator of ``library``."""

import torch

from ..checks import check_choice, check_flags, check_inputs, check_state
from ..dispatch import BACKENDS
from .library import differentiable_chunk_gdn2, differentiable_recurrent_gdn2, recurrent_gdn2_inplace_op
from .reference import naive_recurrent_gdn2
from .split import segments_of, split_gdn2

__all__ = ["chunk_gdn2", "fused_recurrent_gdn2", "recurrent_gdn2", "recurrent_gdn2_"]


def _call(
    op, q, k, v, g, b, w, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
    A_log, dt_bias, use_sigmoid_in_kernel, erase_scale, cu_seqlens, resets, backend, num_segments=1,
):  # fmt: skip
    check_choice("backend", backend, (*BACKENDS, "reference"))
    check_flags(
        output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel, use_sigmoid_in_kernel=use_sigmoid_in_kernel,
    )  # fmt: skip
    if backend == "reference":
        return naive_recurrent_gdn2(
            q, k, v, g, b, w, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
            A_log, dt_bias, use_sigmoid_in_kernel, erase_scale, cu_seqlens, resets,
        )  # fmt: skip
    scale = check_inputs(
        q, k, v, g, b, w, scale, initial_state, use_gate_in_kernel, A_log, dt_bias,
        use_sigmoid_in_kernel, erase_scale, cu_seqlens, resets,
    )  # fmt: skip
    numbers = (
        scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, use_sigmoid_in_kernel, float(erase_scale), backend,
    )  # fmt: skip
    segments = segments_of(q, v, num_segments, backend)
    if segments > 1 and cu_seqlens is None:
        o, final_state = split_gdn2(op, segments, q, k, v, g, b, w, A_log, dt_bias, initial_state, resets, numbers)
    else:
        o, final_state = op(q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets, *numbers)
    return o, final_state if output_final_state else None


def chunk_gdn2(
    q, k, v, g, b, w,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    use_sigmoid_in_kernel=False,
    erase_scale=1.0,
    cu_seqlens=None,
    resets=None,
    backend="auto",
    num_segments=1,
):  # fmt: skip
    """Gated DeltaNet-2 over whole sequences, chunk by chunk: for training and prefill.

    Per head, with state S [K, V] (arXiv 2605.22791; the recurrence in ``reference``),

        S_t = (I - k_t (b_t * k_t)^T) Diag(exp(g_t)) S_{t-1} + k_t (w_t * v_t)^T        o_t = scale * S_t^T q_t

    Args:
        q, k: query and key [B, T, H, K]; float16, bfloat16, float32 or float64. Keys should have length 1. B and T may
            be 0.
        v: value [B, T, HV, V], q's dtype. HV is a multiple of H: value head j reads key head j // (HV // H).
        g: natural-log decay per key channel [B, T, H, K], <= 0, -inf allowed; float32 recommended.
        b: erase gate [B, T, H, K] in [0, 1], or [0, 2] for negative eigenvalues.
        w: write gate [B, T, HV, V] in [0, 1].
        scale: of the output; None means K ** -0.5.
        initial_state: [N, HV, K, V]; None means zeros. N is B, or the number of packed sequences.
        output_final_state: return the final state too.
        use_qk_l2norm_in_kernel: use q / sqrt(sum(q^2) + 1e-6), and k likewise.
        use_gate_in_kernel: g is raw, and the decay is -exp(A_log[h]) * softplus(g + dt_bias[h, :]).
        A_log: [H], with use_gate_in_kernel.
        dt_bias: [H, K] or [H * K] or None, with use_gate_in_kernel.
        use_sigmoid_in_kernel: b and w are logits, and the gates are erase_scale * sigmoid(b) and sigmoid(w).
        erase_scale: 1.0, or 2.0 to allow negative eigenvalues, with use_sigmoid_in_kernel.
        cu_seqlens: int32 or int64 [N + 1], from 0 to T: B is 1 and sequences are packed end to end; the state starts
            afresh, or at initial_state[n], in each. Empty sequences are allowed.
        resets: bool [B, T], True where a token begins a new document: the state before it is forgotten, the initial
            state included. Fixed shapes, so it compiles once and shards with the sequence.
        backend: "auto" (Triton on a GPU that it serves, otherwise chunked PyTorch; on a GPU that is said in the log
            once: no Triton, older than sm_80, float64, heads above 256), "triton", "torch", or "reference" (token by
            token, autograd).
        num_segments: cut the sequence in so many segments that run side by side, for long sequences of few heads on a
            GPU that they do not fill; "auto" does so where it should pay, never on a CPU. For any T: what is left over
            when T is cut evenly follows the segments. Costs K more value columns, and more is saved for backward (see
            below). Has no effect with cu_seqlens.

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] (float64 for float64 inputs, float32 otherwise)
        or None. Both carry gradients to every tensor input. State, decay and sums are kept in that same precision.
        Only the inputs are saved for the backward pass; with more than one segment also a tensor like q, and for each
        segment the state it is entered with [HV, K, V] and its transition [H, K, K].

    The tensors may be DTensors, all of them: sharded on B (N, for the states), or on H and HV where the mesh divides H,
    the op communicates nothing and returns the same sharding.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
    """
    return _call(
        differentiable_chunk_gdn2, q, k, v, g, b, w, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias, use_sigmoid_in_kernel, erase_scale,
        cu_seqlens, resets, backend, num_segments,
    )  # fmt: skip


def recurrent_gdn2(
    q, k, v, g, b, w,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    use_sigmoid_in_kernel=False,
    erase_scale=1.0,
    cu_seqlens=None,
    resets=None,
    backend="auto",
):  # fmt: skip
    """Gated DeltaNet-2 one token after the other: for decoding. Arguments, returns and errors of :func:`chunk_gdn2`.

    Gradients flow here too, by the chunked backward.
    """
    return _call(
        differentiable_recurrent_gdn2, q, k, v, g, b, w, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias, use_sigmoid_in_kernel, erase_scale,
        cu_seqlens, resets, backend,
    )  # fmt: skip


fused_recurrent_gdn2 = recurrent_gdn2


def recurrent_gdn2_(
    q, k, v, g, b, w, state,
    scale=None,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    use_sigmoid_in_kernel=False,
    erase_scale=1.0,
    cu_seqlens=None,
    resets=None,
    backend="auto",
):  # fmt: skip
    """:func:`recurrent_gdn2` that starts from ``state`` and leaves the final state there: a step of decoding that
    allocates nothing but its output.

    Args:
        state: [N, HV, K, V], contiguous, float32 (float64 for float64 inputs), read and overwritten. N is B, or the
            number of packed sequences. A sequence of no tokens keeps its state.
        The others: as in :func:`chunk_gdn2`.

    Returns:
        o [B, T, HV, V] in v's dtype.

    Raises:
        RuntimeError: a gradient would be needed; there is none through a state that is overwritten.
        TypeError, ValueError: naming the argument, what came and what is allowed. ``state`` is then as it was.
    """
    check_choice("backend", backend, (*BACKENDS, "reference"))
    check_flags(
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_gate_in_kernel=use_gate_in_kernel,
        use_sigmoid_in_kernel=use_sigmoid_in_kernel,
    )  # fmt: skip
    scale = check_inputs(
        q, k, v, g, b, w, scale, None, use_gate_in_kernel, A_log, dt_bias,
        use_sigmoid_in_kernel, erase_scale, cu_seqlens, resets,
    )  # fmt: skip
    check_state(state, q, v, cu_seqlens)
    tensors = (q, k, v, g, b, w, A_log, dt_bias, state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise RuntimeError(
            "recurrent_gdn2_ overwrites its state and has no gradient; use recurrent_gdn2 or torch.no_grad()"
        )
    if backend == "reference":
        o, final_state = naive_recurrent_gdn2(
            q, k, v, g, b, w, scale, state, True, use_qk_l2norm_in_kernel, use_gate_in_kernel,
            A_log, dt_bias, use_sigmoid_in_kernel, erase_scale, cu_seqlens, resets,
        )  # fmt: skip
        state.copy_(final_state)
        return o
    return recurrent_gdn2_inplace_op(
        q, k, v, g, b, w, A_log, dt_bias, state, cu_seqlens, resets, scale,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_sigmoid_in_kernel, float(erase_scale),
        backend,
    )  # fmt: skip
