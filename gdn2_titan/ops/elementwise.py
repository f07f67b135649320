"""Functions of one number whose bits depend on nothing but the number.

PyTorch's own take one path through a vector and another through what is left over at its end, on the CPU, so that the
last bit depends on where in a tensor a number stands. exp and log1p do not; what is made of these is the same anywhere.
"""

import torch
from torch import Tensor

__all__ = ["BATCH_INVARIANT", "sigmoid", "silu", "softplus"]

# The backend for which a row's results do not depend on what else is in the batch, nor on how its tokens come.
BATCH_INVARIANT = "batch_invariant"


def _exp_of_minus_abs(x):
    """Never exp of a positive number. Not by abs, whose slope at 0 is 0."""
    return torch.exp(torch.where(x < 0, x, -x))


def sigmoid(x: Tensor) -> Tensor:
    """torch.sigmoid, any shape; computed in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    e = _exp_of_minus_abs(wide)
    return (torch.where(wide < 0, e, 1.0) / (1 + e)).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """torch.nn.functional.silu, any shape; computed in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * sigmoid(wide)).to(x.dtype)


def softplus(x: Tensor) -> Tensor:
    """torch.nn.functional.softplus of fp32 or fp64, any shape."""
    # Not by clamp_min, whose slope at 0 is 1 until torch 2.13, as wanted here, and 0 from 2.14 on.
    return torch.where(x < 0, 0.0, x) + torch.log1p(_exp_of_minus_abs(x))
