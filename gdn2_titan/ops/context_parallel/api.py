"""Gated DeltaNet-2 over sequences that the ranks of a group share: the public function."""

from ..checks import check_choice, check_flags
from ..gdn2.api import chunk_gdn2
from ..gdn2.arguments import GDN2Inputs, GDN2Options, check_arguments
from . import handoff
from .exchange_cost import choose
from .shards import SequenceShards

__all__ = ["begin_gdn2", "context_parallel_gdn2"]


class _Done:
    """The same where there is nothing to exchange."""

    def __init__(self, results):
        self.results = results

    def finish(self):
        return self.results


def begin_gdn2(
    q, k, v, g, b, w, shards,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    use_sigmoid_in_kernel=False,
    erase_scale=1.0,
    resets=None,
    exchange="auto",
    backend="auto",
):  # fmt: skip
    """:func:`context_parallel_gdn2` up to its exchange, which is then under way. ``finish()`` of what this returns has
    the results. shards: a ``SequenceShards``."""
    check_choice("exchange", exchange, ("auto", *handoff.FORMS))
    check_flags(output_final_state=output_final_state)
    inputs = GDN2Inputs(q, k, v, g, b, w, A_log, dt_bias, initial_state, resets=resets)
    options = GDN2Options(
        scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, use_sigmoid_in_kernel, erase_scale, backend
    )
    options = check_arguments(inputs, options)
    if shards.size == 1:
        return _Done(
            chunk_gdn2(
                q, k, v, g, b, w, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
                use_gate_in_kernel, A_log, dt_bias, use_sigmoid_in_kernel, erase_scale, None, resets, backend,
            )
        )  # fmt: skip
    if q.shape[1] % shards.per_rank:
        raise ValueError(f"q has {q.shape[1]} tokens; with layout {shards.layout!r} they must be an even number")
    if exchange == "scan" and shards.size & (shards.size - 1):
        raise ValueError(f"exchange is 'scan'; with {shards.size} ranks it must be 'gather' or 'auto'")
    if exchange == "auto":
        size, (B, _, H, K), (HV, V) = inputs.compute_dtype.itemsize, q.shape, v.shape[2:]
        exchange = choose(shards, B * H * K * K * size, B * HV * K * V * size, output_final_state)
    return handoff.begin(
        q, k, v, g, b, w, A_log, dt_bias, initial_state, resets, options, output_final_state, exchange, shards
    )


def context_parallel_gdn2(
    q, k, v, g, b, w, *,
    group,
    layout="contiguous",
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    use_sigmoid_in_kernel=False,
    erase_scale=1.0,
    resets=None,
    exchange="auto",
    backend="auto",
):  # fmt: skip
    """Gated DeltaNet-2 over sequences of T tokens that the ranks of a group share: :func:`chunk_gdn2` of the whole.

    Every rank calls it with tensors of the same shapes, and what a rank receives does not depend on T. Gradients are
    those of the sum of all ranks' losses.

    Args:
        q, k, v, g, b, w: this rank's tokens, T / ranks of them, in the axis of T; shapes and dtypes of
            :func:`chunk_gdn2`.
        group: a ProcessGroup, or a 1-D DeviceMesh.
        layout: "contiguous", rank r has segment r of R; or "head_tail", it has segments r and 2R - 1 - r of 2R, one
            after the other, as TorchTitan's load balancer deals them. T / ranks is then even.
        initial_state: [B, HV, K, V], read by the rank that has the first token (rank 0), where its gradient comes out;
            elsewhere its gradient is zero. Given on all ranks or on none.
        output_final_state: on all ranks or on none; every rank gets the state after the whole sequence.
        resets: bool [B, T / ranks], this rank's.
        exchange: "gather", one message each way; "scan", log2(ranks) messages, in all fewer bytes, for a number of
            ranks that is a power of two; "auto" takes the one that should be faster (``exchange_cost``).
        backend: "auto", "triton" or "torch".
        All others: of :func:`chunk_gdn2`.

    Returns:
        o [B, T / ranks, HV, V] in v's dtype, and the final state [B, HV, K, V] or None. Differentiable once.
        Saved for backward: the inputs, one tensor like q, and transitions and states that do not depend on T.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
    """
    shards = SequenceShards.of(group, layout)
    return begin_gdn2(
        q, k, v, g, b, w, shards, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        use_gate_in_kernel, A_log, dt_bias, use_sigmoid_in_kernel, erase_scale, resets, exchange, backend,
    ).finish()  # fmt: skip
