"""Mamba-3 as a sequence mixer, SISO and MIMO, on the operator of GDN-2, of which it is one call.

Per head, with state S [N, P], dt = softplus(its projection + bias), A = -softplus(its projection), l a sigmoid, and
a = exp(dt A), a token writes a part of itself and the rest of the token before it (a trapezoid):

    S_t = a_t S_{t-1} + (1 - l_t) dt_t a_t k_{t-1} v_{t-1}^T + l_t dt_t k_t v_t^T        y_t = S_t^T q_t + D v_t

Keys and queries are RMS-normalised, get a bias, and half of their channels are turned in pairs by the sum so far of
pi tanh(theta_t) dt_t. The decay of a token is on all that was before it, so a token may write ahead what the next one
owes it, n_t = (1 - l_{t+1}) dt_{t+1}: with w_t = l_t dt_t + n_t the operator's state is S, less what is not due yet,
which is taken off its output: n_t (q_t . k_t) v_t. At the end of a sequence, a segment or a document n is 0; the next
segment adds what it owes, n k v^T, to the state that it enters.

MIMO of rank R: R keys, values and queries a token and head. They are R steps of the operator, the decay on the first;
a step reads what later steps of its token write, which is added.

Shapes: B batch, T tokens, D hidden size, H heads of size P, N the size of keys, G = N / 4 pairs that are turned.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2_titan.ops import chunk_gdn2, recurrent_gdn2
from gdn2_titan.ops.context_parallel.api import begin_gdn2
from gdn2_titan.ops.context_parallel.tokens import gather_sequence
from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options
from gdn2_titan.ops.gdn2.segmented import check_num_segments

from .checks import check_count, check_mamba, check_turned
from .decay import DecayParameters
from .init import fill_
from .rows import Rows
from .this_rank import of_heads, of_this_rank

__all__ = ["Mamba3", "Mamba3State"]

SLOWEST = -1e-4  # the most that A is


class Mamba3State(NamedTuple):
    """What a layer carries from one segment of a sequence to the next."""

    memory: Tensor  # [B, H, N, P] fp32
    key: Tensor  # [B, H, R, N], of the last token, turned
    value: Tensor  # [B, H, R, P]
    turned: Tensor  # [B, H, G] fp32, the angles of the last token, from 0 to 2 pi


class SharedNorm(nn.Module):
    """The weights of the RMS norms of keys and queries, which all heads share. Read, never called."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, size))


class HeadParameters(nn.Module):
    """What each head has for itself. Read, never called. Rank 1 has no scales: they would be the projections'."""

    def __init__(self, num_heads: int, head_dim: int, state_size: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.D = nn.Parameter(torch.empty(num_heads))
        self.bc_bias = nn.Parameter(torch.empty(num_heads, 2, rank, state_size))
        for name in ("in_scale", "gate_scale", "out_scale"):
            scale = nn.Parameter(torch.empty(num_heads, rank, head_dim)) if rank > 1 else None
            self.register_parameter(name, scale)

    def init_weights(self) -> None:
        for parameter in (self.D, self.bc_bias):
            fill_(parameter, nn.init.ones_)
        if self.rank > 1:
            fill_(self.gate_scale, nn.init.ones_)
            for parameter in (self.in_scale, self.out_scale):
                fill_(parameter, lambda x: x.fill_(1 / self.rank))


class Mamba3(nn.Module):
    """Mamba-3 as a sequence mixer: x [B, T, D] -> [B, T, D]. No convolution; the output passes silu(z) as a gate.

    The projections are linear layers whose names end in ``_proj``: z and x [H * P]; bc, keys and queries of all heads
    [2 * R * N]; dt, a and trap [H]; angle [N / 4]; o.

    Args:
        hidden_size, num_heads, head_dim, state_size: D, H, P and N, a multiple of 4.
        rank: R; 1 is SISO.
        norm_eps: of the RMS norms of keys and queries.
        backend, num_segments: of the operator, see :class:`gdn2_titan.models.GatedDeltaNet2`.

    dt_bias stays in fp32 at least, see ``decay.DecayParameters``.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    OF_ALL_HEADS = ("bc_proj", "bc_norm", "angle_proj")

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int = 64, state_size: int = 64, rank: int = 1,
        norm_eps: float = 1e-5, backend: str = "auto", num_segments: int | str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        check_count("hidden_size", hidden_size)
        sizes = {"num_heads": num_heads, "head_dim": head_dim, "state_size": state_size, "rank": rank}
        check_mamba(sizes, norm_eps, backend)
        check_turned("state_size", state_size)
        check_num_segments(num_segments)
        self.backend, self.num_segments, self.norm_eps = backend, num_segments, norm_eps
        self.head_dim, self.state_size, self.rank = head_dim, state_size, rank
        inner = num_heads * head_dim
        linear = functools.partial(nn.Linear, bias=False)
        self.z_proj = linear(hidden_size, inner)
        self.x_proj = linear(hidden_size, inner)
        self.bc_proj = linear(hidden_size, 2 * rank * state_size)
        self.dt_proj = linear(hidden_size, num_heads)
        self.a_proj = linear(hidden_size, num_heads)
        self.trap_proj = linear(hidden_size, num_heads)
        self.angle_proj = linear(hidden_size, state_size // 4)
        self.bc_norm = SharedNorm(state_size)
        self.heads = HeadParameters(num_heads, head_dim, state_size, rank)
        self.decay = DecayParameters(num_heads, 1, has_rate=False)
        self.o_proj = linear(inner, hidden_size)
        # A SequenceShards where ranks share a sequence (context parallelism); T is then what this rank has of it.
        self.shards = None
        self.init_weights()

    def forward(
        self, x: Tensor, resets: Tensor | None = None, *, state: Mamba3State | None = None,
        return_state: bool = False, rows: Rows | None = None, record: list[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Mamba3State]:  # fmt: skip
        """x [B, T, D], resets bool [B, T] or None -> [B, T, D], or ([B, T, D], Mamba3State) with ``return_state``.

        state, rows, record: as of :class:`gdn2_titan.models.GatedDeltaNet2`.

        Raises:
            ValueError: a state or rows are given, or a state is asked for, where ranks share the sequence.
        """
        if record is not None:
            record.append(x)
        if self.shards is not None:
            self.shards.refuse_states(state, return_state)
            self.shards.refuse_rows(rows)
        if rows is not None and state is not None:
            state = Mamba3State(*map(rows.of_documents, state))
        wide = torch.promote_types(x.dtype, torch.float32)
        # fp32: what decays and turns, and how much is written. [B, T, H]
        dt = F.softplus(self.dt_proj(x).to(wide) + of_this_rank(self.decay.dt_bias)[:, 0].to(wide))
        decay = dt * (-F.softplus(self.a_proj(x).to(wide))).clamp(max=SLOWEST)
        own = torch.sigmoid(self.trap_proj(x).to(wide))
        theta = torch.tanh(of_heads(self.angle_proj(x)).to(wide))
        turns = math.pi * theta.unsqueeze(2) * dt.unsqueeze(-1)  # [B, T, H, G]
        due = (1 - own) * dt  # to the token before, in units of its k v^T
        ahead, first_due, turned = self._from_neighbours(due, turns, resets, state, rows)
        write = own * dt + ahead

        heads = dt.shape[2]  # counted from the tensors: under tensor parallelism a rank holds some of them
        v = self.x_proj(x).unflatten(-1, (heads, 1, -1))
        gate = self.z_proj(x).unflatten(-1, (heads, 1, -1))  # [B, T, H, R or 1, P]
        if self.rank > 1:
            # In the projections' dtype, also where autocast makes that another than the parameters'.
            v = (v * of_this_rank(self.heads.in_scale)).to(v.dtype)
            gate = gate * of_this_rank(self.heads.gate_scale)
        k, q = self._keys_and_queries(of_heads(self.bc_proj(x)), turned, heads, v.dtype)  # [B, T, H, R, N]
        o, memory = self._mix(q, k, v, decay, write, first_due, state, resets, rows, return_state)
        o = o + self._within_tokens(q, k, v, write, ahead)
        o = (o + of_this_rank(self.heads.D)[:, None, None] * v) * F.silu(gate)
        o = (o if self.rank == 1 else o * of_this_rank(self.heads.out_scale)).sum(3)
        y = self.o_proj(o.flatten(-2))
        if not return_state:
            return y
        last = self._last(memory, k, v, turned, state, rows)
        return y, last if rows is None else Mamba3State(*map(rows.of_rows, last))

    def state_after(
        self, record: list[Tensor], resets: Tensor | None, *, state: Mamba3State | None, rows: Rows | None
    ) -> Mamba3State:
        """As :meth:`GatedDeltaNet2.state_after`."""
        return self(*record, resets, state=state, return_state=True, rows=rows)[1]

    def _from_neighbours(self, due, turns, resets, state, rows):
        """What each token writes ahead [B, T, H]; what the first one of each sequence owes [N, H], None without a state
        to owe it to; and the angle of each [B, T, H, G], from 0 to 2 pi.

        Only differences of angles count. So a document may go on from the angle of the one before."""
        begins = resets
        if rows is not None:
            bounds = rows.cu_seqlens
            begins = torch.zeros(due.shape[1] + 1, dtype=torch.bool, device=due.device)
            begins = begins.index_fill(0, bounds[:-1], True)[None, :-1]
        following = due if begins is None else due.masked_fill(begins.unsqueeze(-1), 0)
        if self.shards is not None:
            following, turns = self.shards.rows(following), self.shards.rows(turns)
        # The sum may be of many turns, and what is left of it in fp32 must be right.
        angle = turns.cumsum(1, dtype=torch.float64)
        if self.shards is not None:
            after, before = self._exchanged(following[:, 0], angle[:, -1])
            angle = (angle + before.unsqueeze(1)).view(*due.shape, -1)
            ahead = torch.cat((following[:, 1:], after.unsqueeze(1)), 1).view(due.shape)
            return ahead, None, angle.remainder(2 * math.pi).to(turns.dtype)
        ahead = F.pad(following[:, 1:], (0, 0, 0, 1))
        first_due = None
        if state is not None and rows is None:
            first_due, angle = due[:, 0], angle + state.turned.unsqueeze(1)
        elif state is not None:
            padded = F.pad(angle[0], (0, 0, 0, 0, 1, 0))
            shift = state.turned - padded.index_select(0, bounds[:-1])
            document = torch.searchsorted(bounds[1:], torch.arange(due.shape[1], device=due.device), right=True)
            angle = angle + shift.index_select(0, document)
            first_due = F.pad(due[0], (0, 0, 0, 1)).index_select(0, bounds[:-1])
            first_due = first_due.masked_fill((bounds.diff() == 0).unsqueeze(-1), 0)
        return ahead, first_due, angle.remainder(2 * math.pi).to(turns.dtype)

    def _exchanged(self, first, total):
        """Of this rank's segments as rows of the batch [B * S, ...]: what the first token of the next segment owes
        [B * S, H], 0 after the last one, and the turns of all segments before [B * S, H, G]."""
        shards = self.shards
        lanes = torch.cat((first.unsqueeze(-1).to(total.dtype), total), -1).unflatten(0, (-1, shards.per_rank))
        known = gather_sequence(lanes, shards)  # [B, segments, H, 1 + G]
        after, before = F.pad(known[:, 1:, :, 0], (0, 0, 0, 1)), known[..., 1:].cumsum(1) - known[..., 1:]
        own = list(shards.segments)
        return after[:, own].flatten(0, 1).to(first.dtype), before[:, own].flatten(0, 1)

    def _keys_and_queries(self, bc, turned, heads, dtype):
        """bc [B, T, 2 R N] -> k, q [B, T, H, R, N] in dtype."""
        bc = F.rms_norm(bc.unflatten(-1, (2, self.rank, -1)), (self.state_size,), None, self.norm_eps)
        bc = bc * of_heads(self.bc_norm.weight).unsqueeze(1)
        bias = of_this_rank(self.heads.bc_bias)
        cos, sin = turned.cos().unsqueeze(3), turned.sin().unsqueeze(3)  # [B, T, H, 1, G]
        found = []
        for i in range(2):
            x = (bc[:, :, i].unsqueeze(2) + bias[:, i]).to(cos.dtype)
            a, b, rest = x.split((cos.shape[-1], cos.shape[-1], 2 * cos.shape[-1]), -1)
            found.append(torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1).to(dtype))
        return found

    def _mix(self, q, k, v, decay, write, first_due, state, resets, rows, return_state):
        """The operator's output [B, T, H, R, P] and final state."""
        R, T = self.rank, q.shape[1]

        def steps(x):
            """[B, T, H, R, ...] -> [B, T * R, H, ...]"""
            return x.transpose(2, 3).flatten(1, 2)

        q_, k_, v_ = map(steps, (q, k, v))
        g = F.pad(decay.unsqueeze(-1), (0, R - 1))  # of the first step alone
        g, w = (steps(x).unsqueeze(-1) for x in (g, write.unsqueeze(-1).expand(*write.shape, R)))
        if resets is not None:
            resets = F.pad(resets.unsqueeze(-1), (0, R - 1)).flatten(1)
        inputs = q_, k_, v_, g.expand(q_.shape), None, w.expand(v_.shape)
        if self.shards is not None:
            options = GDN2Options(1.0, backend=self.backend)
            o, memory = begin_gdn2(GDN2Inputs(*inputs, resets=resets), options, self.shards)()
        else:
            initial = None
            if state is not None:
                owed = torch.einsum("bhrn,bhrp->bhnp", state.key.to(decay.dtype), state.value.to(decay.dtype))
                initial = state.memory + first_due[:, :, None, None] * owed
            step = T == 1 and state is not None
            op = recurrent_gdn2 if step else functools.partial(chunk_gdn2, num_segments=self.num_segments)
            o, memory = op(
                *inputs, scale=1.0, initial_state=initial, output_final_state=return_state, resets=resets,
                cu_seqlens=None if rows is None else rows.cu_seqlens * R, backend=self.backend,
            )  # fmt: skip
        return o.unflatten(1, (T, R)).transpose(2, 3), memory

    def _within_tokens(self, q, k, v, write, ahead):
        """What a step of a token is still to read of the token, less what the token has written ahead."""
        products = q @ k.mT  # [B, T, H, R, R]
        weights = -ahead[..., None, None].expand(products.shape)
        if self.rank > 1:
            weights = weights + write[..., None, None] * weights.new_ones(self.rank, self.rank).triu(1)
        return (weights.to(q.dtype) * products) @ v

    def _last(self, memory, k, v, turned, state, rows):
        """The Mamba3State after these tokens."""
        if rows is None:
            found = k[:, -1], v[:, -1], turned[:, -1]
        else:
            bounds = rows.cu_seqlens
            found = tuple(x[0].index_select(0, (bounds[1:] - 1).clamp_min(0)) for x in (k, v, turned))
            # A document without tokens stays as it was.
            empty = bounds.diff() == 0
            old = [torch.zeros_like(x) for x in found] if state is None else state[1:]
            found = (torch.where(empty.view(-1, *[1] * (x.ndim - 1)), y, x) for x, y in zip(found, old, strict=True))
        return Mamba3State(memory, *found)

    def init_weights(
        self, output_scale: float = 1.0, gain: float = 2**-2.5, dt_min: float = 1e-3, dt_max: float = 1e-1
    ) -> None:
        """As ``Mamba2.init_weights``; biases of keys and queries, D and the gate's scales are 1, those of values in and
        out 1 / R."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                scaled = gain * (output_scale if module is self.o_proj else 1.0)
                fill_(module.weight, functools.partial(nn.init.xavier_uniform_, gain=scaled))
        fill_(self.bc_norm.weight, nn.init.ones_)
        self.heads.init_weights()
        self.decay.init_weights(dt_min, dt_max)
