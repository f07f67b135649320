"""The operator's arguments: one record of tensors, one of options, checked at the door of every public function.

They travel as they are to the kernels. Only ``torch.library`` knows positions: the fields of the two, in their order.
"""

import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice, check_flags, check_packing, check_state_indices, check_tensors, require_shape
from ..dispatch import BACKENDS
from ..elementwise import BATCH_INVARIANT
from .flops import CHUNK

__all__ = ["GDN2Inputs", "GDN2Options", "check_arguments", "check_state"]

LARGEST = torch.finfo(torch.float32).max


class GDN2Inputs(NamedTuple):
    """Tensors of a call; also the gradients of them, None for those that have none. N sequences: B, or those packed."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, H, K]
    b: Tensor | None  # [B, T, H, K]; None: nothing is erased
    w: Tensor  # [B, T, HV, V]
    A_log: Tensor | None = None  # [H]
    dt_bias: Tensor | None = None  # [H, K] or [H * K]
    initial_state: Tensor | None = None  # [N, HV, K, V]
    cu_seqlens: Tensor | None = None  # [N + 1], integers
    resets: Tensor | None = None  # [B, T], bool

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        return self.q, self.k, self.v, self.g, self.b, self.w

    @property
    def num_sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of state, decay and accumulators: fp64 for fp64 inputs, fp32 for all others."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        _, _, HV, V = self.v.shape  # a shape is made anew each time that it is asked for
        return self.num_sequences, HV, self.q.shape[3], V

    @property
    def square_shape(self) -> tuple[int, int, int, int]:
        """Of A and of A_qk: for every chunk and key head what its tokens have to do with each other. With cu_seqlens at
        least as many chunks as there are, so that nobody need read it."""
        B, T, H, _ = self.q.shape
        chunks = B * ((T + CHUNK - 1) // CHUNK) if self.cu_seqlens is None else T // CHUNK + self.num_sequences
        return chunks, H, CHUNK, CHUNK

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The nine that may have gradients, in their order."""
        return *self.tokens, self.A_log, self.dt_bias, self.initial_state

    def map(self, function: Callable[[Tensor], Tensor]) -> "GDN2Inputs":
        """``function`` of every tensor that is there."""
        return GDN2Inputs(*[None if x is None else function(x) for x in self])

    def map_tokens(self, function: Callable[[Tensor], Tensor], initial_state: Tensor | None = None) -> "GDN2Inputs":
        """``function`` of every tensor [B, T, ...] that is there, for sequences that start from ``initial_state``."""
        resets = None if self.resets is None else function(self.resets)
        tokens = [None if x is None else function(x) for x in self.tokens]
        return GDN2Inputs(*tokens, self.A_log, self.dt_bias, initial_state, None, resets)


class GDN2Options(NamedTuple):
    """What is no tensor; see ``gates.activate`` for the middle four and the last."""

    scale: float | None  # None until ``check_arguments`` has put K ** -0.5 there
    l2norm: bool = False
    gate: bool = False
    sigmoid: bool = False
    erase_scale: float = 1.0
    backend: str = "auto"
    lower_bound: float | None = None  # of raw gates


def check_arguments(inputs: GDN2Inputs, options: GDN2Options, reference: bool = False) -> GDN2Options:
    """Raise for arguments that no implementation could serve; return the options with the scale in use.

    Args:
        reference: whether the backend may be "reference" or "batch_invariant", too.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
    """
    scale, l2norm, gate, sigmoid, erase_scale, backend, lower_bound = options
    check_choice("backend", backend, (*BACKENDS, "reference", BATCH_INVARIANT) if reference else BACKENDS)
    check_flags(use_qk_l2norm_in_kernel=l2norm, use_gate_in_kernel=gate, use_sigmoid_in_kernel=sigmoid)
    B, T, H, K, HV, V = _check_tensors(inputs)
    *_, A_log, dt_bias, initial_state, cu_seqlens, resets = inputs
    N = check_packing("q", B, T, cu_seqlens, resets)
    if initial_state is not None:
        require_shape("initial_state", initial_state, (N, HV, K, V), "[N, HV, K, V]")
    if gate:
        if A_log is not None:
            require_shape("A_log", A_log, (H,), "[H]")
        elif lower_bound is None:
            raise ValueError("A_log is None; with use_gate_in_kernel it must be a tensor [H], or lower_bound given")
        if dt_bias is not None and tuple(dt_bias.shape) not in ((H, K), (H * K,)):
            raise ValueError(f"dt_bias has shape {tuple(dt_bias.shape)}; it must be [H, K] = {(H, K)} or [H * K]")
    elif A_log is not None or dt_bias is not None:
        name = "A_log" if A_log is not None else "dt_bias"
        raise ValueError(f"{name} is given but use_gate_in_kernel is False; it must be None then, as g is used as is")
    lower_bound = _checked_bound(lower_bound, gate)
    if erase_scale not in (1.0, 2.0):
        raise ValueError(f"erase_scale is {erase_scale!r}; it must be 1.0 or 2.0")
    if erase_scale != 1.0 and not sigmoid:
        raise ValueError(
            f"erase_scale is {erase_scale!r}; without use_sigmoid_in_kernel it must be 1.0, b is used as is"
        )
    if erase_scale != 1.0 and inputs.b is None:
        raise ValueError(f"erase_scale is {erase_scale!r}; with b = None it must be 1.0, nothing is erased")
    if scale is None:
        scale = K**-0.5
    elif isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale is {scale!r}; it must be a finite number or None for K**-0.5")
    return GDN2Options(float(scale), l2norm, gate, sigmoid, float(erase_scale), backend, lower_bound)


def _checked_bound(lower_bound, gate):
    """A float, or None."""
    if lower_bound is None:
        return None
    if not gate:
        raise ValueError(f"lower_bound is {lower_bound!r}; without use_gate_in_kernel it must be None, g is used as is")
    number = isinstance(lower_bound, numbers.Real) and not isinstance(lower_bound, bool)
    if not number or not -LARGEST <= lower_bound < 0:  # of fp32, in which kernels take it; not of a NaN
        raise ValueError(f"lower_bound is {lower_bound!r}; it must be None or a finite number less than 0")
    return float(lower_bound)


def _check_tensors(inputs):
    """Types, dtypes, devices, and the shapes of tokens. Returns B, T, H, K, HV, V."""
    q, k, v, g, b, w, *_ = inputs
    check_tensors(GDN2Inputs._fields, inputs, required=6, optional=("b",))
    q_shape, v_shape = q.shape, v.shape
    if len(q_shape) != 4:
        raise ValueError(f"q has shape {tuple(q_shape)}; it must have four axes [B, T, H, K]")
    if len(v_shape) != 4:
        raise ValueError(f"v has shape {tuple(v_shape)}; it must have four axes [B, T, HV, V]")
    (B, T, H, K), (_, _, HV, V) = q_shape, v_shape
    if H < 1 or K < 1:
        raise ValueError(f"q has shape {tuple(q_shape)}; H and K of [B, T, H, K] must be at least 1")
    if HV < 1 or V < 1 or HV % H != 0:
        raise ValueError(f"v has {HV} heads of size {V}; the heads must be a positive multiple of q's {H} heads")
    keys_agree = k.shape == g.shape == q_shape and (b is None or b.shape == q_shape)
    if not (keys_agree and v_shape[:2] == (B, T) and w.shape == v_shape):
        for name, x in (("k", k), ("g", g), ("b", k if b is None else b)):
            require_shape(name, x, q_shape, "q's shape [B, T, H, K]")
        require_shape("v", v, (B, T, HV, V), "[B, T, HV, V] with q's B and T")
        require_shape("w", w, v_shape, "v's shape [B, T, HV, V]")
    if not k.dtype == v.dtype == q.dtype:
        name, x = ("k", k) if k.dtype != q.dtype else ("v", v)
        raise TypeError(f"{name} has dtype {x.dtype}; it must be q's dtype {q.dtype}")
    return B, T, H, K, HV, V


def check_state(state: Tensor, inputs: GDN2Inputs, state_indices: Tensor | None) -> None:
    """Raise for an argument ``state`` that cannot be updated in place, or ``state_indices`` that cannot tell where.
    ``check_arguments`` passed the inputs."""
    q, dtype = inputs.q, inputs.compute_dtype
    if not isinstance(state, Tensor):
        raise TypeError(f"state is a {type(state).__name__}; it must be a torch.Tensor")
    if state.device != q.device:
        raise ValueError(f"state is on {state.device}; it must be on q's device {q.device}")
    if state.dtype != dtype:
        raise TypeError(f"state has dtype {state.dtype}; it must be {dtype}, which {q.dtype} is computed in")
    if state_indices is None:
        require_shape("state", state, inputs.state_shape, "[N, HV, K, V]")
        if not state.is_contiguous():
            raise ValueError(f"state has strides {state.stride()}; it must be contiguous, as it is updated in place")
        return
    N, HV, K, V = inputs.state_shape
    require_shape("state", state, (*state.shape[:1], HV, K, V), "[blocks, HV, K, V]")
    if state.stride()[1:] != (K * V, V, 1):
        raise ValueError(f"state has strides {state.stride()}; every block of it must be contiguous")
    check_state_indices(state_indices, "q", q, N)
