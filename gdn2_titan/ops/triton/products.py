"""The matrix product that all kernels use."""

import triton
import triton.language as tl

from .target import interpreted

__all__ = ["dot"]

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b with fp32 accumulation; PRECISION for fp32 operands, see ``target.precision``.

    The interpreter of Triton 3.9 multiplies bf16 wrongly: there, and only here, operands are upcast."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)
