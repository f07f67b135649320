"""The convolution's arguments as one record, checked at the door of every public function."""

from typing import NamedTuple

from torch import Tensor

from ..checks import check_choice, check_packing, check_tensors
from ..dispatch import BACKENDS

__all__ = ["ConvInputs", "checked_inputs"]

WIDTHS = (2, 3, 4)
SILU = ("silu", "swish")
TENSORS = ("x", "weight", "bias", "initial_state", "cu_seqlens", "resets")


class ConvInputs(NamedTuple):
    """What a call is given, in the order in which the operators of ``torch.library`` take it. N sequences: B, or those
    packed."""

    x: Tensor  # [B, T, D]
    weight: Tensor  # [D, W]
    bias: Tensor | None  # [D]
    silu: bool
    initial_state: Tensor | None  # [N, D, W - 1]
    cu_seqlens: Tensor | None  # [N + 1], integers
    resets: Tensor | None  # [B, T], bool
    backend: str = "auto"

    @property
    def num_sequences(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_sequences, self.x.shape[2], self.weight.shape[1] - 1


def checked_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, resets: Tensor | None, backend: str,
) -> ConvInputs:  # fmt: skip
    """The record of arguments that some implementation can serve.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
    """
    check_choice("backend", backend, BACKENDS)
    check_tensors(TENSORS, (x, weight, bias, initial_state, cu_seqlens, resets), required=2)
    if activation not in (None, *SILU):
        raise ValueError(f"activation is {activation!r}; it must be None, 'silu' or 'swish'")
    if x.ndim != 3 or x.shape[2] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [B, T, D], D at least 1")
    B, T, D = x.shape
    if weight.ndim != 2 or weight.shape[0] != D or weight.shape[1] not in WIDTHS:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [D, W] with x's D = {D} and W 2, 3 or 4")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [D] with x's D = {D}")
    N = check_packing("x", B, T, cu_seqlens, resets)
    if initial_state is not None:
        if initial_state.dtype != x.dtype:
            raise TypeError(f"initial_state has dtype {initial_state.dtype}; it must be x's dtype {x.dtype}")
        shape = (N, D, weight.shape[1] - 1)
        if initial_state.shape != shape:
            raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}; it must be [N, D, W-1] = {shape}")
    return ConvInputs(x, weight, bias, activation in SILU, initial_state, cu_seqlens, resets, backend)
