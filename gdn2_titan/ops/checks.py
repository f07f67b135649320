"""Errors at the door of the operators: one sentence with the argument, what came and what is wanted.

Everything here but ``check_cu_seqlens`` looks at shapes, dtypes and devices only, so that it traces under
torch.compile and costs no host synchronisation.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

__all__ = ["check_choice", "check_cu_seqlens", "check_flags", "check_packing", "check_state_indices",
           "check_tensors", "require_shape"]  # fmt: skip

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NOT_FLOAT = ("cu_seqlens", "resets")  # ``check_packing`` looks at their dtypes


def check_choice(name: str, value: object, allowed: Sequence) -> None:
    """Raise ValueError unless an argument is one of the ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def check_flags(**flags: bool) -> None:
    """Raise ValueError unless options that are on or off are bools: a "no" would be on."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be True or False")


def check_tensors(
    names: Sequence[str], tensors: Sequence[Tensor | None], required: int, optional: Collection[str] = ()
) -> None:
    """Raise TypeError or ValueError unless all are tensors of the dtypes that operators take, on the first one's
    device; from number ``required`` on, and of the names ``optional``, they may be None."""
    place = None
    for i, x in enumerate(tensors):
        if x is None and (i >= required or names[i] in optional):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{names[i]} is a {type(x).__name__}; it must be a torch.Tensor")
        if x.dtype not in FLOAT_DTYPES and names[i] not in NOT_FLOAT:
            raise TypeError(f"{names[i]} has dtype {x.dtype}; it must be float16, bfloat16, float32 or float64")
        device = x.device
        if place is None:
            place = device
        elif device != place:
            raise ValueError(f"{names[i]} is on {device}; it must be on {names[0]}'s device {place}")


def require_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless x has this shape; meaning: of its axes."""
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {meaning} = {tuple(shape)}")


def check_packing(name: str, B: int, T: int, cu_seqlens: Tensor | None, resets: Tensor | None) -> int:
    """Check cu_seqlens and resets against an input ``name`` [B, T, ...]; return the number of sequences."""
    if resets is not None:
        if resets.dtype != torch.bool:
            raise TypeError(f"resets has dtype {resets.dtype}; it must be bool")
        require_shape("resets", resets, (B, T), "[B, T]")
    if cu_seqlens is None:
        return B
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; it must be int32 or int64")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be [N + 1] with N >= 1")
    if B != 1:
        raise ValueError(f"{name} has batch size {B}; with cu_seqlens it must be 1, sequences packed end to end")
    return cu_seqlens.shape[0] - 1


def check_state_indices(state_indices: Tensor, name: str, x: Tensor, N: int) -> None:
    """Raise unless state_indices can name the blocks of N sequences of an input ``name``."""
    if not isinstance(state_indices, Tensor):
        raise TypeError(f"state_indices is a {type(state_indices).__name__}; it must be a torch.Tensor or None")
    if state_indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"state_indices has dtype {state_indices.dtype}; it must be int32 or int64")
    if state_indices.device != x.device:
        raise ValueError(f"state_indices is on {state_indices.device}; it must be on {name}'s device {x.device}")
    require_shape("state_indices", state_indices, (N,), "[N]")


def check_cu_seqlens(cu_seqlens: Tensor, T: int) -> None:
    """Raise ValueError unless the values run from 0 to T without falling. Reads the tensor: call in eager code only."""
    bounds = cu_seqlens.tolist()
    falls = any(i > j for i, j in zip(bounds[:-1], bounds[1:], strict=True))
    if bounds[0] != 0 or bounds[-1] != T or falls:
        raise ValueError(f"cu_seqlens is {bounds}; it must start at 0, never fall, and end at T = {T}")
