"""Gated DeltaNet-2 over sequences that the ranks of a group share: the public function, and its first half."""

from collections.abc import Callable

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..checks import check_choice, check_flags
from ..gdn2.arguments import GDN2Inputs, GDN2Options, check_arguments
from ..gdn2.library import differentiable_chunk_gdn2
from . import state
from .exchange import FORMS, choose
from .layout import SequenceShards

__all__ = ["begin_gdn2", "context_parallel_gdn2"]


def begin_gdn2(
    inputs: GDN2Inputs, options: GDN2Options, shards: SequenceShards, output_final_state: bool = False,
    exchange: str = "auto",
) -> Callable[[], tuple[Tensor, Tensor | None]]:  # fmt: skip
    """:func:`context_parallel_gdn2` up to its exchange, which is then under way: call what this returns for the
    results."""
    check_choice("exchange", exchange, ("auto", *FORMS))
    check_flags(output_final_state=output_final_state)
    options = check_arguments(inputs, options)
    if shards.size == 1:  # nothing to exchange
        o, final_state = differentiable_chunk_gdn2(*inputs, *options)
        return lambda: (o, final_state if output_final_state else None)
    B, T, H, K = inputs.q.shape
    if T % shards.per_rank:
        raise ValueError(f"q has {T} tokens; with layout {shards.layout!r} they must be an even number")
    if exchange == "scan" and shards.size & (shards.size - 1):
        raise ValueError(f"exchange is 'scan'; with {shards.size} ranks it must be 'gather' or 'auto'")
    if exchange == "auto":
        size, (HV, V) = inputs.compute_dtype.itemsize, inputs.v.shape[2:]
        exchange = choose(shards, B * H * K * K * size, B * HV * K * V * size, output_final_state)
    return state.begin(inputs, options, shards, exchange, output_final_state)


def context_parallel_gdn2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor | None, w: Tensor, *, group: ProcessGroup | DeviceMesh,
    layout: str = "contiguous", scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None, dt_bias: Tensor | None = None, use_sigmoid_in_kernel: bool = False,
    erase_scale: float = 1.0, resets: Tensor | None = None, exchange: str = "auto", backend: str = "auto",
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
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
            ranks that is a power of two; "auto" takes the one that should be faster (``exchange.choose``).
        backend: "auto", "triton" or "torch".
        All others: of :func:`chunk_gdn2`.

    Returns:
        o [B, T / ranks, HV, V] in v's dtype, and the final state [B, HV, K, V] or None. Differentiable once.
        Saved for backward: the inputs, one tensor like q, and transitions and states that do not depend on T.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
    """
    shards = SequenceShards.of(group, layout)
    inputs = GDN2Inputs(q, k, v, g, b, w, A_log, dt_bias, initial_state, resets=resets)
    options = GDN2Options(
        scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, use_sigmoid_in_kernel, erase_scale, backend, lower_bound
    )
    return begin_gdn2(inputs, options, shards, output_final_state, exchange)()
