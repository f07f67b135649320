"""The matrix product, the rounding and the functions that all kernels use: the one place that knows what Triton's
interpreter gets wrong (3.9): it multiplies bf16 wrongly, truncates where the hardware rounds, and cannot make bf16 of a
bool."""

import math

import triton
import triton.language as tl

from .target import interpreted

__all__ = ["LOG2E", "cast", "dot", "exp2", "opaque", "reciprocal", "sigmoid"]

LOG2E = tl.constexpr(math.log2(math.e))
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b with fp32 accumulation; PRECISION for fp32 operands, see ``target.precision``."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in dtype, rounded to nearest, ties to even."""
    if INTERPRETED:
        if dtype == tl.bfloat16 and x.dtype == tl.float32:
            bits = x.to(tl.uint32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            bits = (bits >> 16) << 16  # of what else is left of 0, .to makes 1e-38
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def exp2(x):
    """2^x to fp32 rounding; 0 where that is below the least normal number. One instruction on NVIDIA."""
    if INTERPRETED:
        return tl.exp2(x)
    if tl.target_info.is_cuda():
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def reciprocal(x):
    """1 / x to fp32 rounding."""
    if INTERPRETED:
        return 1.0 / x
    if tl.target_info.is_cuda():
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) to fp32 rounding."""
    return reciprocal(1.0 + exp2(x * -LOG2E))


@triton.jit
def opaque(x):
    """int32 x, of which the compiler knows nothing: what is made of it is made where it is needed. What can be made
    before a loop is kept in registers all through it, and other things are spilled."""
    if INTERPRETED:
        return x
    if tl.target_info.is_cuda():
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, is_pure=False, pack=1)
    return x
