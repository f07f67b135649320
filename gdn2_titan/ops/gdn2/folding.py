"""The states between segments, by the kernels that serve a call; and ``torch.ops.gdn2_titan.fold_maps``, the same for
segments that several devices hold.

The operator has no derivative: what exchanges maps differentiates nothing through it (``context_parallel/state``).
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..custom_op import define, no_autocast
from ..dispatch import use_triton
from . import maps

__all__ = ["advance", "fold", "fold_maps"]


def fold(
    M: Tensor, D: Tensor | None, state: Tensor | None, backend: str, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """``maps.fold`` by the kernels that serve it, in bodies of operators. backend: "auto", "triton" or "torch"."""
    like = state if D is None else D
    served_by = maps
    if like.numel() > 0 and use_triton("the state", like, backend, like.shape[-2:]):
        from .triton import fold as served_by  # not before it is needed: Triton is not everywhere
    return served_by.fold(M, D, state, transposed)


def _kernel(M, D, state, backend, transposed):
    with no_autocast(M):
        entered, left = fold(M, D, state, backend, transposed)
    return entered.contiguous(), left.contiguous()


def _fake(M, D, state, backend, transposed):
    B, count, *_ = M.shape
    sizes = (state if D is None else D).shape[-3:]
    return M.new_empty(B, count, *sizes), M.new_empty(B, *sizes)


_op = define(
    "gdn2_titan::fold_maps",
    "(Tensor M, Tensor? D, Tensor? state, str backend, bool transposed) -> (Tensor, Tensor)",
    _kernel, _fake,
)  # fmt: skip


def fold_maps(
    M: Tensor, D: Tensor | None, state: Tensor | None, backend: str, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """``fold`` as an operator, which a compiler does not look into."""
    return _op(M, D, state, backend, transposed)


def advance(M: Tensor, S: Tensor, D: Tensor | None, backend: str, transposed: bool = False) -> Tensor:
    """M S + D, or M^T S + D. M [B, H, K, K]; S and D [B, HV, K, V], D None for zeros; S may be another M."""
    _, left = fold_maps(M.unsqueeze(1), None if D is None else D.unsqueeze(1), S, backend, transposed)
    return left


@register_flop_formula(torch.ops.gdn2_titan.fold_maps)
def _(M_shape, D_shape, state_shape, *args, out_shape=None, **kwargs):
    K = M_shape[-1]
    (entered_shape, _) = out_shape
    B, count, HV, _, V = entered_shape
    return 2 * B * count * HV * K * K * V
