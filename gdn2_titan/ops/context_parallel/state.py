"""Segments run side by side, each handing on what its tokens make of the state.

Forward, a segment runs once, not knowing the state it is entered with, as a map (``segments``). The maps are exchanged,
by ``exchange_gather`` or ``exchange_scan``, which gives the entering states S, and o = o_0 + P S.

Backward is the mirror image. The outputs' own gradient of an entering state is P^T dO; exchanged, with the transitions
that forward received, it gives the gradient of each state that a segment leaves, and the ordinary backward does the
rest. Nothing is differentiated through the exchange: dO and both states are all that the gradients of a segment need.

Autograd sees two nodes. What ``_Leave`` begins to exchange in backward ``_Enter`` waits for; so whatever the caller
computed between ``begin`` and ``finish`` is differentiated in between, while messages are under way, as it was computed
while they were under way forward. What ``_Enter`` needs in backward that only ``_Leave`` knows travels as the gradients
of carriers, tensors without content.

Not so the message itself, which has no content before it is waited for: anomaly mode and hooks read gradients between
nodes. In eager PyTorch both nodes know a list, a mailbox, in which it lies. A compiler traces the two nodes apart and
has no mailbox; within its graph nothing reads the message before the wait, and it travels as a gradient too.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..custom_op import no_autocast
from ..gdn2.arguments import GDN2Inputs, GDN2Options
from ..gdn2.folding import advance
from ..gdn2.library import differentiable_chunk_gdn2_backward
from ..gdn2.maps import read, read_transposed
from ..gdn2.segments import segment_gdn2
from .exchange import FORMS
from .exchange_scan import ordered_after
from .layout import SequenceShards

__all__ = ["begin"]


class _Call(NamedTuple):
    """What both nodes know of a call."""

    shards: SequenceShards
    options: GDN2Options
    form: str  # of FORMS
    final: bool  # whether the state after the whole sequence is asked for
    mailbox: list[Tensor] | None


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


def _sum(dfinal, shards):
    """The gradient of all ranks' losses. Every rank takes part, whether or not its own loss reads the final state."""
    dfinal = torch.ops._c10d_functional.all_reduce(dfinal.contiguous(), "sum", shards.group)
    return torch.ops._c10d_functional.wait_tensor(dfinal)


class _Enter(torch.autograd.Function):
    """Where the gradients of the inputs come out. Forward, it makes carriers, in the order of ``backward``."""

    @staticmethod
    def forward(ctx, call, D, *inputs):
        inputs, shards, form = GDN2Inputs(*inputs), call.shards, FORMS[call.form]
        ctx.save_for_backward(*inputs._replace(initial_state=None))
        ctx.call = call
        ctx.initial = None if inputs.initial_state is None else inputs.initial_state.dtype
        S, B, *state = D.shape
        entering, kept = (B * S, *state), (form.kept(shards), B, inputs.q.shape[2], *2 * inputs.q.shape[3:])
        pending = form.pending_back(D.shape, shards) if call.mailbox is None else (0,)
        shapes = entering, kept, pending, D.shape, D.shape[1:]
        return (inputs.v.new_zeros(()).expand(inputs.v.shape), *(D.new_zeros(()).expand(shape) for shape in shapes))

    @staticmethod
    def backward(ctx, do, entering, kept, pending, dD, dfinal):
        inputs, call = GDN2Inputs(*ctx.saved_tensors), ctx.call
        shards, backend = call.shards, call.options.backend
        if call.mailbox is not None:
            pending = call.mailbox.pop()
        with no_autocast(do):
            leaving = FORMS[call.form].receive_back(pending, dD, kept, shards, backend)
            if call.final and _has_last(shards):
                leaving = torch.cat((leaving[:-1], dfinal.unsqueeze(0)))
            *grads, dA_log, ddt_bias, dentering = differentiable_chunk_gdn2_backward(
                shards.rows(do), _from_lanes(leaving), *inputs.map_tokens(shards.rows, entering), *call.options
            )
        grads = [None if x is None else grad.view(x.shape) for grad, x in zip(grads, inputs.tokens, strict=True)]
        dA_log, ddt_bias = None if inputs.A_log is None else dA_log, None if inputs.dt_bias is None else ddt_bias
        dinitial_state = None
        if ctx.initial is not None:
            dinitial_state = _lanes(dentering, shards)[0].to(ctx.initial)
            if not _has_first(shards):
                dinitial_state = torch.zeros_like(dinitial_state)
        return None, None, *grads, dA_log, ddt_bias, dinitial_state, None, None


class _Leave(torch.autograd.Function):
    """Where the outputs come out, and their gradients go in."""

    @staticmethod
    def forward(
        ctx, call, o, P, M, D, initial_state, pending, more,
        carrier, carried_entering, carried_kept, carried_pending, carried_dD, carried_dfinal,
    ):  # fmt: skip
        shards, backend, ctx.call = call.shards, call.options.backend, call
        with no_autocast(o):
            pending = [x for x in (pending, more) if x is not None]
            entering, final_state, kept = FORMS[call.form].receive(pending, M, D, shards, call.final, backend)
            if initial_state is not None and _has_first(shards):
                entering = torch.cat((initial_state.to(D.dtype).unsqueeze(0), entering[1:]))
            entering = _from_lanes(entering)
            o = (o + read(P, entering)).to(o.dtype).view(carrier.shape)
        ctx.save_for_backward(P, entering, kept, M[-1] if call.final and _has_last(shards) else None)
        return o, D.new_empty(0) if final_state is None else final_state

    @staticmethod
    def backward(ctx, do, dfinal):
        P, entering, kept, transition = ctx.saved_tensors
        call, shards = ctx.call, ctx.call.shards
        with no_autocast(do):
            dD = _lanes(read_transposed(P, shards.rows(do), entering.dtype), shards)
            if call.final:
                dfinal = _sum(ordered_after(dfinal, dD), shards)
                if transition is None:
                    dD = ordered_after(dD, dfinal)
                else:
                    last = advance(transition, dfinal, dD[-1], call.options.backend, transposed=True)
                    dD = torch.cat((dD[:-1], last.unsqueeze(0)))
            pending = FORMS[call.form].send_back(dD, shards)
            if call.mailbox is not None:
                call.mailbox[:] = [pending]
                pending = dD.new_empty(0)
        return (*(None,) * 8, do, entering, kept, pending, dD, dfinal if call.final else None)


def begin(
    inputs: GDN2Inputs, options: GDN2Options, shards: SequenceShards, form: str, final: bool
) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """The call of ``shards`` up to its exchange, which is then under way; what this returns waits for it and gives
    o [B, T, HV, V] and the state after the whole sequence [B, HV, K, V] or None. Arguments checked; form: of FORMS;
    final: whether that state is asked for."""
    initial_state = None if inputs.initial_state is None else inputs.initial_state.detach()
    with torch.no_grad(), no_autocast(inputs.q):
        o, P, M, D = segment_gdn2(inputs.map_tokens(shards.rows), options)
        M, D = _lanes(M, shards), _lanes(D, shards)
        if initial_state is not None and _has_first(shards):
            first = advance(M[0], initial_state.to(D.dtype), D[0], options.backend)
            D = torch.cat((first.unsqueeze(0), D[1:]))
        pending, more = (*FORMS[form].send(M, D, shards, final), None)[:2]
    call = _Call(shards, options, form, final, None if torch.compiler.is_compiling() else [])
    carriers = _Enter.apply(call, D, *inputs)

    def finish():
        o_whole, final_state = _Leave.apply(call, o, P, M, D, initial_state, pending, more, *carriers)
        return o_whole, final_state if final else None

    return finish
