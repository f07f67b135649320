"""Gated DeltaNet-2 over sequences that ranks share: each hands on what its tokens make of the state.

Forward, a rank runs its segments once, not knowing the states they are entered with, as maps (``segments``). The maps
are exchanged, by ``exchange_gather`` or ``exchange_scan``, which gives the entering states S, and o = o_0 + P S.

Backward is the mirror image. The outputs' own gradient of an entering state is P^T dO; exchanged, with the transitions
that forward received, it gives the gradient of each state that a segment leaves, and the ordinary backward does the
rest. Nothing is differentiated through the exchange: dO and both states are all that the gradients of a segment need.

Autograd sees two nodes. What ``_Leave`` begins to exchange in backward ``_Enter`` waits for; so whatever the caller
computed between ``begin_gdn2`` and ``finish`` is differentiated in between, while messages are under way, as it was
computed while they were under way forward.
"""

import torch

from . import exchange_gather, exchange_scan
from .dispatch import BACKENDS
from .exchange_cost import choose
from .functional import chunk_gdn2
from .library import chunk_gdn2_backward_once, no_autocast
from .maps import apply, apply_transposed, read, read_transposed
from .segments import segment_gdn2_op
from .shards import SequenceShards
from .validation import check_choice, check_inputs

__all__ = ["begin_gdn2", "context_parallel_gdn2"]

FORMS = {"gather": exchange_gather, "scan": exchange_scan}


def _rows(x, shards):
    """[B, T, ...] -> [B * S, T / S, ...]: a rank's segments as sequences of a batch. A view."""
    return None if x is None else x.unflatten(1, (shards.per_rank, -1)).flatten(0, 1)


def _lanes(x, shards):
    """[B * S, ...] -> [S, B, ...]."""
    return x.unflatten(0, (-1, shards.per_rank)).transpose(0, 1).contiguous()


def _from_lanes(x):
    """The inverse of ``_lanes``."""
    return x.transpose(0, 1).flatten(0, 1)


def _has_first(shards):
    return shards.segments[0] == 0


def _has_last(shards):
    return shards.segments[-1] == shards.size * shards.per_rank - 1


class _Enter(torch.autograd.Function):
    """Where the gradients of the inputs come out. Forward, it makes carriers, in the order of ``backward``."""

    @staticmethod
    def forward(
        ctx, q, k, v, g, b, w, A_log, dt_bias, initial_state, resets, D, numbers, final, form, group, rank, size, layout
    ):
        ctx.save_for_backward(q, k, v, g, b, w, A_log, dt_bias, resets)
        ctx.numbers, ctx.final, ctx.form, ctx.shards = numbers, final, form, (group, rank, size, layout)
        ctx.initial = None if initial_state is None else initial_state.dtype
        shards, form, (H, K) = SequenceShards(group, rank, size, layout), FORMS[form], q.shape[2:]
        S, B, *state = D.shape
        entering, kept = (B * S, *state), (form.kept(shards), B, H, K, K)
        shapes = entering, kept, form.pending_back(D.shape, shards), D.shape, D.shape[1:]
        return (v.new_zeros(()).expand(v.shape), *(D.new_zeros(()).expand(shape) for shape in shapes))

    @staticmethod
    def backward(ctx, do, entering, kept, pending, dD, dfinal):
        q, k, v, g, b, w, A_log, dt_bias, resets = ctx.saved_tensors
        shards = SequenceShards(*ctx.shards)
        with no_autocast(q):
            leaving = FORMS[ctx.form].receive_back(pending, dD, kept, shards)
            if ctx.final and _has_last(shards):
                leaving = torch.cat((leaving[:-1], dfinal.unsqueeze(0)))
            *grads, dA_log, ddt_bias, dentering = chunk_gdn2_backward_once(
                _rows(do, shards), _from_lanes(leaving), *(_rows(x, shards) for x in (q, k, v, g, b, w)),
                A_log, dt_bias, entering, None, _rows(resets, shards), *ctx.numbers,
            )  # fmt: skip
        grads = [grad.view(x.shape) for grad, x in zip(grads, (q, k, v, g, b, w), strict=True)]
        dA_log, ddt_bias = None if A_log is None else dA_log, None if dt_bias is None else ddt_bias
        dinitial_state = None
        if ctx.initial is not None:
            dinitial_state = _lanes(dentering, shards)[0].to(ctx.initial)
            if not _has_first(shards):
                dinitial_state = torch.zeros_like(dinitial_state)
        return (*grads, dA_log, ddt_bias, dinitial_state, *(None,) * 9)


class _Leave(torch.autograd.Function):
    """Where the outputs come out, and their gradients go in."""

    @staticmethod
    def forward(
        ctx, o, P, M, D, initial_state, pending, more, final, form, group, rank, size, layout,
        carrier, carried_entering, carried_kept, carried_pending, carried_dD, carried_dfinal,
    ):  # fmt: skip
        shards = SequenceShards(group, rank, size, layout)
        with no_autocast(o):
            pending = [pending] if more is None else [pending, more]
            entering, final_state, kept = FORMS[form].receive(pending, M, D, shards, final)
            if initial_state is not None and _has_first(shards):
                entering = torch.cat((initial_state.to(D.dtype).unsqueeze(0), entering[1:]))
            entering = _from_lanes(entering)
            o = (o + read(P, entering)).to(o.dtype).view(carrier.shape)
        ctx.final, ctx.form, ctx.shards = final, form, (group, rank, size, layout)
        ctx.save_for_backward(P, entering, kept, M[-1] if final and _has_last(shards) else None)
        return o, D.new_empty(0) if final_state is None else final_state

    @staticmethod
    def backward(ctx, do, dfinal):
        P, entering, kept, transition = ctx.saved_tensors
        shards = SequenceShards(*ctx.shards)
        with no_autocast(do):
            dD = _lanes(read_transposed(P, _rows(do, shards), entering.dtype), shards)
            if ctx.final:
                # Of the sum of all ranks' losses. Every rank takes part, whether or not its own loss reads the state.
                dfinal = torch.ops._c10d_functional.all_reduce(dfinal.contiguous(), "sum", shards.group)
                dfinal = torch.ops._c10d_functional.wait_tensor(dfinal)
                if transition is not None:
                    dD = torch.cat((dD[:-1], (dD[-1] + apply_transposed(transition, dfinal)).unsqueeze(0)))
            pending = FORMS[ctx.form].send_back(dD, shards)
        return (*(None,) * 13, do, entering, kept, pending, dD, dfinal if ctx.final else None)


class Handoff:
    """A call whose exchange is under way; ``finish`` returns what :func:`context_parallel_gdn2` does."""

    def __init__(self, arguments, carriers, output_final_state):
        self.arguments, self.carriers = arguments, carriers
        self.output_final_state = output_final_state

    def finish(self):
        o, final_state = _Leave.apply(*self.arguments, *self.carriers)
        return o, final_state if self.output_final_state else None


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
    """:func:`context_parallel_gdn2` up to the exchange, which is under way when this returns a :class:`Handoff`."""
    check_choice("backend", backend, BACKENDS)
    check_choice("exchange", exchange, ("auto", *FORMS))
    options = (use_qk_l2norm_in_kernel, use_gate_in_kernel, use_sigmoid_in_kernel, float(erase_scale), backend)
    if shards.size == 1:
        return _Done(
            chunk_gdn2(
                q, k, v, g, b, w, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
                use_gate_in_kernel, A_log, dt_bias, use_sigmoid_in_kernel, erase_scale, None, resets, backend,
            )
        )  # fmt: skip
    scale = check_inputs(
        q, k, v, g, b, w, scale, initial_state, use_gate_in_kernel, A_log, dt_bias,
        use_sigmoid_in_kernel, erase_scale, None, resets,
    )  # fmt: skip
    if q.shape[1] % shards.per_rank:
        raise ValueError(f"q has {q.shape[1]} tokens; with layout {shards.layout!r} they must be an even number")
    numbers = (scale, *options)
    with torch.no_grad(), no_autocast(q):
        o, P, M, D = segment_gdn2_op(
            *(_rows(x, shards) for x in (q, k, v, g, b, w)), A_log, dt_bias, _rows(resets, shards), *numbers
        )
        M, D = _lanes(M, shards), _lanes(D, shards)
        if initial_state is not None and _has_first(shards):
            D = torch.cat(((D[0] + apply(M[0], initial_state.to(D.dtype))).unsqueeze(0), D[1:]))
        form = choose(shards, M, D, output_final_state) if exchange == "auto" else exchange
        pending = FORMS[form].send(M, D, shards, output_final_state)
    where = (output_final_state, form, shards.group, shards.rank, shards.size, shards.layout)
    carriers = _Enter.apply(q, k, v, g, b, w, A_log, dt_bias, initial_state, resets, D, numbers, *where)
    initial_state = None if initial_state is None else initial_state.detach()
    pending, more = (*pending, None)[:2]
    return Handoff((o, P, M, D, initial_state, pending, more, *where), carriers, output_final_state)


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
