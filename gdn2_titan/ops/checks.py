"""Errors at the door of the op: one sentence with the argument, what came and what is wanted.

Everything here but ``check_cu_seqlens`` looks at shapes, dtypes and devices only, so that it traces under
torch.compile and costs no host synchronisation.
"""

import math
import numbers

import torch

from .gdn2.gates import compute_dtype

__all__ = [
    "FLOAT_DTYPES", "check_choice", "check_cu_seqlens", "check_flags", "check_inputs", "check_packing", "check_state",
]  # fmt: skip

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_choice(name, value, allowed):
    """Raise ValueError unless an argument is one of the ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def check_flags(**flags):
    """Raise ValueError unless options that are on or off are bools: a "no" would be on."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be True or False")


def _require_tensor(name, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor")


def _require_float(name, x):
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be float16, bfloat16, float32 or float64")


def _require_shape(name, x, shape, meaning):
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {meaning} = {tuple(shape)}")


def check_packing(name, B, T, cu_seqlens, resets):
    """Check cu_seqlens and resets against an input ``name`` [B, T, ...]; return the number of sequences."""
    if resets is not None:
        if resets.dtype != torch.bool:
            raise TypeError(f"resets has dtype {resets.dtype}; it must be bool")
        _require_shape("resets", resets, (B, T), "[B, T]")
    if cu_seqlens is None:
        return B
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; it must be int32 or int64")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be [N + 1] with N >= 1")
    if B != 1:
        raise ValueError(f"{name} has batch size {B}; with cu_seqlens it must be 1, sequences packed end to end")
    return cu_seqlens.shape[0] - 1


def check_inputs(
    q, k, v, g, b, w, scale, initial_state, use_gate_in_kernel, A_log, dt_bias,
    use_sigmoid_in_kernel, erase_scale, cu_seqlens, resets,
):  # fmt: skip
    """Raise ValueError or TypeError for arguments that no implementation could serve; return the scale in use."""
    tensors = {"q": q, "k": k, "v": v, "g": g, "b": b, "w": w}
    for name, x in tensors.items():
        _require_tensor(name, x)
        _require_float(name, x)
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must have four axes [B, T, H, K]")
    if v.ndim != 4:
        raise ValueError(f"v has shape {tuple(v.shape)}; it must have four axes [B, T, HV, V]")
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if H < 1 or K < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}; H and K of [B, T, H, K] must be at least 1")
    if HV < 1 or V < 1 or HV % H != 0:
        raise ValueError(f"v has {HV} heads of size {V}; the heads must be a positive multiple of q's {H} heads")
    for name in ("k", "g", "b"):
        _require_shape(name, tensors[name], q.shape, "q's shape [B, T, H, K]")
    _require_shape("v", v, (B, T, HV, V), "[B, T, HV, V] with q's B and T")
    _require_shape("w", w, v.shape, "v's shape [B, T, HV, V]")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; it must be q's dtype {q.dtype}")
    optional = {"initial_state": initial_state, "A_log": A_log, "dt_bias": dt_bias}
    optional |= {"cu_seqlens": cu_seqlens, "resets": resets}
    for name, x in optional.items():
        if x is not None:
            _require_tensor(name, x)
    for name, x in (tensors | optional).items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}; it must be on q's device {q.device}")

    N = check_packing("q", B, T, cu_seqlens, resets)
    if initial_state is not None:
        _require_float("initial_state", initial_state)
        _require_shape("initial_state", initial_state, (N, HV, K, V), "[N, HV, K, V]")

    if use_gate_in_kernel:
        if A_log is None:
            raise ValueError("A_log is None; with use_gate_in_kernel it must be a tensor [H]")
        _require_float("A_log", A_log)
        _require_shape("A_log", A_log, (H,), "[H]")
        if dt_bias is not None:
            _require_float("dt_bias", dt_bias)
            if tuple(dt_bias.shape) not in ((H, K), (H * K,)):
                raise ValueError(f"dt_bias has shape {tuple(dt_bias.shape)}; it must be [H, K] = {(H, K)} or [H * K]")
    elif A_log is not None or dt_bias is not None:
        name = "A_log" if A_log is not None else "dt_bias"
        raise ValueError(f"{name} is given but use_gate_in_kernel is False; it must be None then, as g is used as is")
    if erase_scale not in (1.0, 2.0):
        raise ValueError(f"erase_scale is {erase_scale!r}; it must be 1.0 or 2.0")
    if erase_scale != 1.0 and not use_sigmoid_in_kernel:
        raise ValueError(
            f"erase_scale is {erase_scale!r}; without use_sigmoid_in_kernel it must be 1.0, b is used as is"
        )
    if scale is None:
        return K**-0.5
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale is {scale!r}; it must be a finite number or None for K**-0.5")
    return float(scale)


def check_state(state, q, v, cu_seqlens):
    """Raise for a ``state`` that cannot be updated in place. The other arguments have passed ``check_inputs``."""
    _require_tensor("state", state)
    if state.device != q.device:
        raise ValueError(f"state is on {state.device}; it must be on q's device {q.device}")
    dtype = compute_dtype(q)
    if state.dtype != dtype:
        raise TypeError(f"state has dtype {state.dtype}; it must be {dtype}, which {q.dtype} is computed in")
    (B, _, _, K), (HV, V) = q.shape, v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _require_shape("state", state, (N, HV, K, V), "[N, HV, K, V]")
    if not state.is_contiguous():
        raise ValueError(f"state has strides {state.stride()}; it must be contiguous, as it is updated in place")


def check_cu_seqlens(cu_seqlens, T):
    """Raise ValueError unless the values run from 0 to T without falling. Reads the tensor: call in eager code only."""
    bounds = cu_seqlens.tolist()
    falls = any(i > j for i, j in zip(bounds[:-1], bounds[1:], strict=True))
    if bounds[0] != 0 or bounds[-1] != T or falls:
        raise ValueError(f"cu_seqlens is {bounds}; it must start at 0, never fall, and end at T = {T}")
