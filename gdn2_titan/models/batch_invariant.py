"""Linear layers and softmax attention of which a row's results do not depend on what else is in the batch, nor on
whether its tokens come at once or one by one: backend "batch_invariant", on the CPU.

A matrix product takes another kernel for another number of rows, so here it has the same number always. Attention takes
other blocks for other lengths, so here every query is by itself, with those keys alone that it sees. Backward is the
usual one, of which nothing is promised but the gradients.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2_titan.ops.elementwise import BATCH_INVARIANT, sigmoid, silu

__all__ = ["RowLinear", "attend", "linear_of", "sigmoid_of", "silu_of"]

# Rows of a matrix product: a step of one token costs as many, a long text has that much less than a large one's speed.
TILE = 16


def linear_of(backend: str) -> type[nn.Linear]:
    """The class of linear layers for a backend."""
    return RowLinear if backend == BATCH_INVARIANT else nn.Linear


def silu_of(backend: str) -> Callable[[Tensor], Tensor]:
    """SiLU for a backend."""
    return silu if backend == BATCH_INVARIANT else F.silu


def sigmoid_of(backend: str) -> Callable[[Tensor], Tensor]:
    """The sigmoid for a backend."""
    return sigmoid if backend == BATCH_INVARIANT else torch.sigmoid


class RowLinear(nn.Linear):
    """nn.Linear of x [..., D] on the CPU.

    Raises:
        RuntimeError: on another device or compiled, or where the machine's matrix products depend on a row's place.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            where = "is compiled" if torch.compiler.is_compiling() else f"gets an input on {x.device}"
            raise RuntimeError(
                f"backend is {BATCH_INVARIANT!r} and the model {where}; it must run on the CPU, uncompiled"
            )
        return _Tiles.apply(x, self.weight, self.bias)


@functools.cache
def _check_places(rows, columns, dtype, threads):
    """Raise unless a row of a tile has the same result at any place in it, among any other rows."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, columns, generator=generator).to(dtype) for n in (TILE, rows))
    y = F.linear(x, weight)
    for shift in (1, TILE // 2 + 1):
        alone = torch.zeros_like(x)
        alone[shift] = x[0]
        if not (
            torch.equal(F.linear(x.roll(shift, 0), weight), y.roll(shift, 0))
            and torch.equal(F.linear(alone, weight)[shift], y[0])
        ):
            raise RuntimeError(
                f"backend is {BATCH_INVARIANT!r}, and on this machine a {dtype} product of {TILE} rows with a matrix "
                f"{[rows, columns]} depends on a row's place; it must be another backend"
            )


class _Tiles(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        rows = x.reshape(-1, x.shape[-1])
        padded = F.pad(rows, (0, 0, 0, -len(rows) % TILE))
        parts = [F.linear(tile, weight, bias) for tile in padded.split(TILE)]
        with torch.autocast("cpu", enabled=False):
            _check_places(*weight.shape, parts[0].dtype, torch.get_num_threads())
        return torch.cat(parts)[: len(rows)].view(*x.shape[:-1], -1)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        flat = dy.flatten(0, -2)
        dbias = flat.sum(0) if ctx.biased else None
        return dy @ weight, flat.T @ x.reshape(-1, x.shape[-1]).to(flat.dtype), dbias


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention [B, heads, T, head_dim] of q, shaped likewise, and k and v [B, kv_heads, S, head_dim].

    mask: bool [B or 1, 1, T, S]; None: the last query sees all keys, each before it one less.
    """
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])[None, None]
    return _OneByOne.apply(q, k, v, mask.expand(len(q), -1, -1, -1))


class _OneByOne(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, q, k, v, mask):
        ctx.save_for_backward(q, k, v, mask)
        grouped = q.shape[1] != k.shape[1]
        o = torch.zeros_like(q)
        for row, seen in enumerate(mask[:, 0]):
            for token, keys in enumerate(seen):
                kv = (x[row : row + 1, :, keys] for x in (k, v))
                query = q[row : row + 1, :, token : token + 1]
                o[row, :, token] = F.scaled_dot_product_attention(query, *kv, enable_gqa=grouped)[0, :, 0]
        return o

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, do):
        *qkv, mask = ctx.saved_tensors
        with torch.enable_grad():
            qkv = [x.detach().requires_grad_() for x in qkv]
            grouped = qkv[0].shape[1] != qkv[1].shape[1]
            o = F.scaled_dot_product_attention(*qkv, attn_mask=mask, enable_gqa=grouped)
        return *torch.autograd.grad(o, qkv, do), None
