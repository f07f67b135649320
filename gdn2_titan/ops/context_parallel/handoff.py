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

import torch

from ..custom_op import no_autocast
from ..gdn2.arguments import GDN2Inputs
from ..gdn2.library import differentiable_chunk_gdn2_backward
from ..gdn2.maps import apply, apply_transposed, read, read_transposed
from ..gdn2.segments import segment_gdn2
from . import exchange_gather, exchange_scan
from .ordering import after
from .shards import SequenceShards

__all__ = ["FORMS", "Handoff", "begin"]

FORMS = {"gather": exchange_gather, "scan": exchange_scan}


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
    def forward(
        ctx, q, k, v, g, b, w, A_log, dt_bias, initial_state, resets, D, numbers,
        final, form, group, rank, size, per_rank, mailbox,
    ):  # fmt: skip
        ctx.save_for_backward(q, k, v, g, b, w, A_log, dt_bias, resets)
        ctx.mailbox = mailbox
        ctx.numbers, ctx.final, ctx.form, ctx.shards = numbers, final, form, (group, rank, size, per_rank)
        ctx.initial = None if initial_state is None else initial_state.dtype
        shards, form, (H, K) = SequenceShards(group, rank, size, per_rank), FORMS[form], q.shape[2:]
        S, B, *state = D.shape
        entering, kept = (B * S, *state), (form.kept(shards), B, H, K, K)
        pending = form.pending_back(D.shape, shards) if mailbox is None else (0,)
        shapes = entering, kept, pending, D.shape, D.shape[1:]
        return (v.new_zeros(()).expand(v.shape), *(D.new_zeros(()).expand(shape) for shape in shapes))

    @staticmethod
    def backward(ctx, do, entering, kept, pending, dD, dfinal):
        q, k, v, g, b, w, A_log, dt_bias, resets = ctx.saved_tensors
        shards = SequenceShards(*ctx.shards)
        if ctx.mailbox is not None:
            pending = ctx.mailbox.pop()
        with no_autocast(q):
            leaving = FORMS[ctx.form].receive_back(pending, dD, kept, shards)
            if ctx.final and _has_last(shards):
                leaving = torch.cat((leaving[:-1], dfinal.unsqueeze(0)))
            *grads, dA_log, ddt_bias, dentering = differentiable_chunk_gdn2_backward(
                shards.rows(do), _from_lanes(leaving), *(shards.rows(x) for x in (q, k, v, g, b, w)),
                A_log, dt_bias, entering, None, shards.rows(resets), *ctx.numbers,
            )  # fmt: skip
        grads = [grad.view(x.shape) for grad, x in zip(grads, (q, k, v, g, b, w), strict=True)]
        dA_log, ddt_bias = None if A_log is None else dA_log, None if dt_bias is None else ddt_bias
        dinitial_state = None
        if ctx.initial is not None:
            dinitial_state = _lanes(dentering, shards)[0].to(ctx.initial)
            if not _has_first(shards):
                dinitial_state = torch.zeros_like(dinitial_state)
        return (*grads, dA_log, ddt_bias, dinitial_state, *(None,) * 10)


class _Leave(torch.autograd.Function):
    """Where the outputs come out, and their gradients go in."""

    @staticmethod
    def forward(
        ctx, o, P, M, D, initial_state, pending, more, final, form, group, rank, size, per_rank, mailbox,
        carrier, carried_entering, carried_kept, carried_pending, carried_dD, carried_dfinal,
    ):  # fmt: skip
        shards = SequenceShards(group, rank, size, per_rank)
        with no_autocast(o):
            pending = [x for x in (pending, more) if x is not None]
            entering, final_state, kept = FORMS[form].receive(pending, M, D, shards, final)
            if initial_state is not None and _has_first(shards):
                entering = torch.cat((initial_state.to(D.dtype).unsqueeze(0), entering[1:]))
            entering = _from_lanes(entering)
            o = (o + read(P, entering)).to(o.dtype).view(carrier.shape)
        ctx.final, ctx.form, ctx.shards, ctx.mailbox = final, form, (group, rank, size, per_rank), mailbox
        ctx.save_for_backward(P, entering, kept, M[-1] if final and _has_last(shards) else None)
        return o, D.new_empty(0) if final_state is None else final_state

    @staticmethod
    def backward(ctx, do, dfinal):
        P, entering, kept, transition = ctx.saved_tensors
        shards = SequenceShards(*ctx.shards)
        with no_autocast(do):
            dD = _lanes(read_transposed(P, shards.rows(do), entering.dtype), shards)
            if ctx.final:
                dfinal = _sum(after(dfinal, dD), shards)
                if transition is None:
                    dD = after(dD, dfinal)
                else:
                    dD = torch.cat((dD[:-1], (dD[-1] + apply_transposed(transition, dfinal)).unsqueeze(0)))
            pending = FORMS[ctx.form].send_back(dD, shards)
            if ctx.mailbox is not None:
                ctx.mailbox[:] = [pending]
                pending = dD.new_empty(0)
        return (*(None,) * 14, do, entering, kept, pending, dD, dfinal if ctx.final else None)


class Handoff:
    """A call whose exchange is under way."""

    def __init__(self, arguments, carriers, final):
        self.arguments, self.carriers, self.final = arguments, carriers, final

    def finish(self):
        """o [B, T, HV, V], and the state after the whole sequence [B, HV, K, V] or None."""
        o, final_state = _Leave.apply(*self.arguments, *self.carriers)
        return o, final_state if self.final else None


def begin(q, k, v, g, b, w, A_log, dt_bias, initial_state, resets, numbers, final, form, shards):
    """The call of ``shards`` up to its exchange, which is then under way. Arguments checked; numbers: of the operators;
    final: whether the state after the whole sequence will be asked for; form: of FORMS."""
    with torch.no_grad(), no_autocast(q):
        inputs = GDN2Inputs(q, k, v, g, b, w, A_log, dt_bias, resets=resets)
        o, P, M, D = segment_gdn2(inputs.map_tokens(shards.rows), numbers)
        M, D = _lanes(M, shards), _lanes(D, shards)
        if initial_state is not None and _has_first(shards):
            D = torch.cat(((D[0] + apply(M[0], initial_state.to(D.dtype))).unsqueeze(0), D[1:]))
        pending = FORMS[form].send(M, D, shards, final)
    mailbox = None if torch.compiler.is_compiling() else []
    where = (final, form, shards.group, shards.rank, shards.size, shards.per_rank, mailbox)
    carriers = _Enter.apply(q, k, v, g, b, w, A_log, dt_bias, initial_state, resets, D, numbers, *where)
    initial_state = None if initial_state is None else initial_state.detach()
    pending, more = (*pending, None, None)[:2]
    return Handoff((o, P, M, D, initial_state, pending, more, *where), carriers, final)
