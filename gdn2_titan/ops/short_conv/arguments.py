"""The convolution's arguments as one record for each tensor, checked at the door of every public function."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..checks import check_choice, check_packing, check_tensors, require_shape
from ..dispatch import BACKENDS
from ..elementwise import BATCH_INVARIANT

__all__ = ["ConvInputs", "check_state", "checked_inputs", "checked_qkv"]

WIDTHS = (2, 3, 4)
SILU = ("silu", "swish")
TENSORS = ("x", "weight", "bias", "initial_state", "cu_seqlens", "resets")
QKV, QKV_WEIGHTS, QKV_STATES = ("q", "k", "v"), ("q_weight", "k_weight", "v_weight"), ("q_state", "k_state", "v_state")


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
    cu_seqlens: Tensor | None, resets: Tensor | None, backend: str, names: Sequence[str] = TENSORS,
) -> ConvInputs:  # fmt: skip
    """The record of arguments that some implementation can serve. names: of the tensors, as the caller knows them.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
    """
    x_name, weight_name, bias_name, state_name, *_ = names
    check_choice("backend", backend, (*BACKENDS, BATCH_INVARIANT))
    check_tensors(names, (x, weight, bias, initial_state, cu_seqlens, resets), required=2)
    if activation not in (None, *SILU):
        raise ValueError(f"activation is {activation!r}; it must be None, 'silu' or 'swish'")
    if x.ndim != 3 or x.shape[2] == 0:
        raise ValueError(f"{x_name} has shape {tuple(x.shape)}; it must be [B, T, D], D at least 1")
    B, T, D = x.shape
    if weight.ndim != 2 or weight.shape[0] != D or weight.shape[1] not in WIDTHS:
        raise ValueError(
            f"{weight_name} has shape {tuple(weight.shape)}; it must be [D, W] with {x_name}'s D = {D} and W 2, 3 or 4"
        )
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"{bias_name} has shape {tuple(bias.shape)}; it must be [D] with {x_name}'s D = {D}")
    N = check_packing(x_name, B, T, cu_seqlens, resets)
    if initial_state is not None:
        _check_dtype(state_name, initial_state, x_name, x)
        require_shape(state_name, initial_state, (N, D, weight.shape[1] - 1), "[N, D, W-1]")
    return ConvInputs(x, weight, bias, activation in SILU, initial_state, cu_seqlens, resets, backend)


def checked_qkv(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, activation: str | None,
    q_state: Tensor | None, k_state: Tensor | None, v_state: Tensor | None, cu_seqlens: Tensor | None,
    resets: Tensor | None, backend: str,
) -> tuple[ConvInputs, ConvInputs, ConvInputs]:  # fmt: skip
    """A record for each of q, k and v, which agree in all that one launch needs.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
    """
    check_tensors([*QKV, *QKV_WEIGHTS], (q, k, v, q_weight, k_weight, v_weight), required=6)
    for name, x in (("k", k), ("v", v)):
        require_shape(name, x, (*q.shape[:2], *x.shape[2:]), "[B, T, D] with q's B and T")
    parts = []
    for i, (x, weight, state) in enumerate(((q, q_weight, q_state), (k, k_weight, k_state), (v, v_weight, v_state))):
        names = (QKV[i], QKV_WEIGHTS[i], "bias", QKV_STATES[i], "cu_seqlens", "resets")
        parts.append(checked_inputs(x, weight, None, activation, state, cu_seqlens, resets, backend, names))
        require_shape(QKV_WEIGHTS[i], weight, (x.shape[2], q_weight.shape[1]), "[D, W] with q_weight's W")
        for names, tensor, first in ((QKV, x, q), (QKV_WEIGHTS, weight, q_weight)):
            if tensor.dtype != first.dtype:
                raise TypeError(f"{names[i]} has dtype {tensor.dtype}; it must be {names[0]}'s dtype {first.dtype}")
    missing = [name for name, part in zip(QKV_STATES, parts, strict=True) if part.initial_state is None]
    if missing and len(missing) < len(parts):
        raise ValueError(f"{missing[0]} is None; q_state, k_state and v_state must be given together or not at all")
    return tuple(parts)


def check_state(name: str, state: Tensor, x_name: str, inputs: ConvInputs, pool: bool) -> None:
    """Raise for an argument ``name`` that cannot be updated in place by a call with these inputs, which were checked
    without it; pool: whether indices name blocks of it."""
    check_tensors((x_name, name), (inputs.x, state), required=2)
    _check_dtype(name, state, x_name, inputs.x)
    N, D, S = inputs.state_shape
    if pool:
        require_shape(name, state, (*state.shape[:1], D, S), "[blocks, D, W-1]")
    else:
        require_shape(name, state, (N, D, S), "[N, D, W-1]")
    if state.stride()[1:] != (S, 1):
        raise ValueError(f"{name} has strides {state.stride()}; every entry [D, W-1] of it must be contiguous")
    if state.shape[0] > 1 and state.stride(0) < D * S:
        raise ValueError(f"{name} has strides {state.stride()}; its entries [D, W-1] must not overlap")


def _check_dtype(name, state, x_name, x):
    if state.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {state.dtype}; it must be {x_name}'s dtype {x.dtype}")
