"""Softmax attention with rotary positions and grouped key/value heads, full or in a sliding window."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gdn2_titan.ops.context_parallel.tokens import gather_sequence, preceding
from gdn2_titan.ops.elementwise import BATCH_INVARIANT

from .batch_invariant import attend, linear_of
from .checks import check_attention, check_count
from .init import linear_
from .masks import reach
from .rows import Rows

__all__ = ["Attention", "AttentionState", "rotary_angles", "rotate"]


@functools.cache
def _compiled_flex_attention():
    return torch.compile(flex_attention)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """positions [T] or [B, T] -> cosines and sines stacked, fp32 [2, ..., T, 1, head_dim / 2]."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None, None].float() * frequency
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [..., T, heads, head_dim], each pair (x_i, x_{i + head_dim / 2}) turned by its angle of ``rotary_angles``."""
    cos, sin = angles
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class AttentionState(NamedTuple):
    """What a layer carries from one segment of a sequence to the next: with a window W, the last W - 1 tokens."""

    keys: Tensor  # [B, S, kv_heads, head_dim], turned by their angles
    values: Tensor  # [B, S, kv_heads, head_dim]


class Attention(nn.Module):
    """Causal softmax attention: x [B, T, D] -> [B, T, D]. Heads of size D / num_heads.

    window: the one that the masks will have, if any. backend: "batch_invariant" as in GatedDeltaNet2; of no account are
    others. Where ranks share a sequence (``shards``, see
    ``parallel.context``) T is what a rank has of it, and the window tells which keys and values it gets from others.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int | None = None, window: int | None = None,
        backend: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        check_attention(hidden_size, num_heads, num_kv_heads)
        if window is not None:
            check_count("window", window)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = hidden_size // num_heads
        self.grouped = num_kv_heads != num_heads
        self.window = window
        self.shards = None
        self.batch_invariant = backend == BATCH_INVARIANT
        linear = functools.partial(linear_of(backend), bias=False)
        self.q_proj = linear(hidden_size, num_heads * self.head_dim)
        self.k_proj = linear(hidden_size, num_kv_heads * self.head_dim)
        self.v_proj = linear(hidden_size, num_kv_heads * self.head_dim)
        self.o_proj = linear(num_heads * self.head_dim, hidden_size)

    def forward(
        self, x: Tensor, angles: Tensor, mask: Tensor | BlockMask | None, *,
        state: AttentionState | None = None, return_state: bool = False, rows: Rows | None = None,
        record: list[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, AttentionState]:  # fmt: skip
        """x [B, T, D] -> [B, T, D], or ([B, T, D], AttentionState) with ``return_state``.

        angles: of ``rotary_angles``; mask: of ``masks.attention_mask``, with shards of ``masks.context_mask``, with a
        state of ``masks.continued_mask``. state: the AttentionState of the segment before. rows: a Rows where x is
        [1, N, D], rows of unequal lengths end to end; angles are then of these N tokens, the mask is of rows of L.
        record: a list that gets what ``state_after`` takes.

        Raises:
            ValueError: a state or rows are given, or a state is asked for, where ranks share the sequence.
        """
        if self.shards is not None:
            self.shards.refuse_states(state, return_state)
            self.shards.refuse_rows(rows)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, angles), rotate(k, angles)
        if self.shards is not None:
            q, k, v = self._with_keys_of_others(q, k, v)
        if record is not None:
            record.extend((k, v))
        if rows is not None:
            q, k, v = map(rows.side_by_side, (q, k, v))
        if state is not None:
            k, v = torch.cat((state.keys, k), 1), torch.cat((state.values, v), 1)
        if return_state:
            kept = AttentionState(*(self._kept(t, q.shape[1], rows) for t in (k, v)))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, T, head_dim]
        if self.batch_invariant:
            o = attend(q, k, v, mask)
        elif mask is None or isinstance(mask, Tensor):
            # After a state, no mask means that the one token at hand sees all keys.
            causal = mask is None and state is None
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        else:
            o = _compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=self.grouped)
        o = o.transpose(1, 2).flatten(2)
        o = o if rows is None else rows.end_to_end(o)
        y = self.o_proj(o if self.shards is None else o.reshape(*x.shape[:2], -1))
        return (y, kept) if return_state else y

    def state_after(
        self, record: list[Tensor], resets: Tensor | None, *, state: AttentionState | None, rows: Rows | None
    ) -> AttentionState:
        """As that of GatedDeltaNet2; resets are of no account to keys and values."""
        record = record if rows is None else list(map(rows.side_by_side, record))
        seen = record if state is None else [torch.cat(pair, 1) for pair in zip(state, record, strict=True)]
        return AttentionState(*(self._kept(x, new.shape[1], rows) for x, new in zip(seen, record, strict=True)))

    def _kept(self, x, length, rows):
        """What later segments can still see of keys or values x [B, S + length, heads, head_dim]."""
        if rows is not None:
            return rows.tail(x, min(rows.longest, x.shape[1], x.shape[1] if self.window is None else self.window - 1))
        if self.window is None or x.shape[1] < self.window:
            return x
        x = x[:, x.shape[1] - self.window + 1 :]
        return x if length == 1 else x.clone()  # a view would keep the whole segment in memory

    def _with_keys_of_others(self, q, k, v):
        """q, k, v [B, T_local, heads, head_dim] -> q as the mask's rows and k, v of all tokens that these may see."""
        kv, past = torch.cat((k, v), 2), reach(self.window, k.shape[1], self.shards)
        if past is None:
            kv = gather_sequence(kv, self.shards)
        else:
            q, own = self.shards.rows(q), self.shards.rows(kv)
            kv = torch.cat((preceding(kv, self.shards, past), own), 1) if past else own
        return q, *kv.chunk(2, 2)

    def init_weights(self, output_scale: float = 1.0, std: float | None = 0.02) -> None:
        """std: of ``init.linear_``."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            linear_(projection.weight, std)
        linear_(self.o_proj.weight, std, output_scale)
