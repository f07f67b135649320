"""From raw projections to what the recurrence reads: L2 norm, decay, sigmoid gates, resets; and back.

``activate`` is differentiable and serves the reference; the chunked kernel calls it without autograd and
``activate_backward`` for the gradients, so that only the raw projections need to be kept.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import GDN2Inputs, GDN2Options

__all__ = ["NORM_EPS", "SATURATED", "STRONG", "activate", "activate_backward", "log_decay"]

NORM_EPS = 1e-6
# Of A_log, what is above it goes into the argument of softplus, see ``_gate``; in fp32 it is also the most that a
# bounded gate's slope has of it.
STRONG = 50.0
# The sigmoid of this is 1 and that of its negative 0, in fp32 as in fp64.
SATURATED = 1000.0
# log1p(exp(x)) is exact to rounding below this and x above it, in fp32 as in fp64.
SOFTPLUS_THRESHOLD = 50.0


def _inverse_norm(x):
    return torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def _between(A_log, low, high):
    """A_log.clamp(low, high), with a slope of 1 at its ends, which torch's has until 2.13 and not from 2.14 on.

    For what is made of A_log, [H, 1]: of what each token has, the decay is flat where it is clamped."""
    return torch.where(A_log > high, high, torch.where(A_log < low, low, A_log))


def _gate(g, A_log, dt_bias):
    """rate [H, 1], stretch [H, 1] and x [B, T, H, K] of g's dtype with the log-decay -rate * softplus(x), whatever the
    finite inputs; softplus(x) is finite.

    That is exp(A_log) and g + dt_bias, unless exp(A_log) is too large or too small a number. Softplus is exp on the
    far left: there A_log is added to x, less STRONG, which the rate keeps. Where x is then no longer far on the left,
    exp of the decay is 0 either way. Softplus is the identity on the far right: x is multiplied by what the rate lacks,
    stretch; elsewhere the decay is none either way.
    """
    info = torch.finfo(g.dtype)
    faint = math.log(info.tiny)
    A_log = A_log.to(g.dtype)[:, None]
    rate = _between(A_log, faint, STRONG).exp()
    stretch = _between((faint - A_log).relu(), 0.0, -faint).neg().exp()
    strong = A_log > STRONG
    x = g * stretch + torch.where(strong, _between(A_log, STRONG, info.max), 0.0)
    rest = torch.where(strong, -STRONG, 0.0)  # not A_log - STRONG, which is rounded
    if dt_bias is not None:
        rest = rest + dt_bias.to(g.dtype).reshape(g.shape[2:]) * stretch
    return rate, stretch, (x + rest).clamp(max=info.max)


def _bounded_gate(g, A_log, dt_bias):
    """slope [H, 1] and x [B, T, H, K] of g's dtype with the log-decay lower_bound * sigmoid(x), whatever the finite
    inputs: x = exp(A_log) * (g + dt_bias), as far as the sigmoid can tell, and its derivative by g.

    Where exp(A_log) is too large or too small a number, x is made in two steps. The slope then leaves out the second
    of them if that would enlarge it: next to g + dt_bias = 0, the only place where the sigmoid is not flat, there may
    be no number as large as the derivative.
    """
    info = torch.finfo(g.dtype)
    x = g if dt_bias is None else g + dt_bias.to(g.dtype).reshape(g.shape[2:])
    x = x.clamp(-info.max, info.max)
    if A_log is None:
        return x.new_ones(()), x.clamp(-SATURATED, SATURATED)
    A_log = A_log.to(g.dtype)[:, None]
    faint, strong = math.log(info.tiny), max(STRONG, 0.5 * math.log(info.max))
    held = _between(A_log, faint, strong)
    rest = _between(A_log - held, faint, -faint)
    less = _between(rest, faint, 0.0)
    slope = (held + less).exp()
    x = (x * held.exp()).clamp(-SATURATED, SATURATED) * less.exp()
    # Where exp(A_log) is too large: for autograd, with the same slope.
    more = (x.detach() * rest.detach().clamp_min(0.0).exp()).clamp(-SATURATED, SATURATED) - x.detach()
    return slope, x + more


def _softplus(x):
    return F.softplus(x, threshold=SOFTPLUS_THRESHOLD)


def log_decay(
    g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None = None,
    sigmoid: Callable[[Tensor], Tensor] = torch.sigmoid, softplus: Callable[[Tensor], Tensor] = _softplus,
) -> Tensor:  # fmt: skip
    """-exp(A_log) * softplus(g + dt_bias) in g's dtype, -inf where that is too large a number; or with a lower_bound
    lower_bound * sigmoid(exp(A_log) * (g + dt_bias)), where A_log None stands for zeros. Shapes as in ``activate``, g
    with any K."""
    if lower_bound is not None:
        return lower_bound * sigmoid(_bounded_gate(g, A_log, dt_bias)[1])
    rate, _, x = _gate(g, A_log, dt_bias)
    return -rate * softplus(x)


def activate(
    inputs: GDN2Inputs, options: GDN2Options, sigmoid: Callable[[Tensor], Tensor] = torch.sigmoid,
    softplus: Callable[[Tensor], Tensor] = _softplus,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """q, k, v, g, b, w in the compute dtype, with what the options say applied to the raw ones; b None stays None.

    A reset is a decay of -inf: exp(-inf) = 0 forgets the state before the token exactly.
    """
    q, k, v, g, b, w = (None if x is None else x.to(inputs.compute_dtype) for x in inputs.tokens)
    if options.l2norm:
        q, k = q * _inverse_norm(q), k * _inverse_norm(k)
    if options.gate:
        g = log_decay(g, inputs.A_log, inputs.dt_bias, options.lower_bound, sigmoid, softplus)
    if options.sigmoid:
        b, w = None if b is None else options.erase_scale * sigmoid(b), sigmoid(w)
    if inputs.resets is not None:
        g = g.masked_fill(inputs.resets[:, :, None, None], -torch.inf)
    return q, k, v, g, b, w


def _l2norm_backward(x, dy):
    r = _inverse_norm(x)
    return r * (dy - x * (r * r * (x * dy).sum(-1, keepdim=True)))


def activate_backward(grads: tuple[Tensor | None, ...], inputs: GDN2Inputs, options: GDN2Options) -> GDN2Inputs:
    """The gradients of the inputs, in their dtypes, from those of what ``activate`` returned; no initial state's."""
    dq, dk, dv, dg, db, dw = grads
    dtype = dq.dtype
    dA_log = ddt_bias = None
    if inputs.resets is not None:
        dg = dg.masked_fill(inputs.resets[:, :, None, None], 0)
    if options.l2norm:
        dq, dk = _l2norm_backward(inputs.q.to(dtype), dq), _l2norm_backward(inputs.k.to(dtype), dk)
    if options.gate:
        g = inputs.g.to(dtype)
        if options.lower_bound is None:
            rate, stretch, x = _gate(g, inputs.A_log, inputs.dt_bias)
            dg = dg * -rate
            dA_log = (dg * _softplus(x)).sum((0, 1, 3))
            dg = dg * torch.sigmoid(x) * stretch
        else:
            slope, x = _bounded_gate(g, inputs.A_log, inputs.dt_bias)
            dg = dg * (options.lower_bound * (torch.sigmoid(x) * torch.sigmoid(-x)))
            dA_log = None if inputs.A_log is None else (dg * x).sum((0, 1, 3))
            dg = dg * slope
        if inputs.dt_bias is not None:
            ddt_bias = dg.sum((0, 1)).reshape(inputs.dt_bias.shape)
    if options.sigmoid:
        w = torch.sigmoid(inputs.w.to(dtype))
        dw = dw * w * (1 - w)
        if inputs.b is not None:
            b = torch.sigmoid(inputs.b.to(dtype))
            db = db * options.erase_scale * b * (1 - b)
    grads = dq, dk, dv, dg, db, dw, dA_log, ddt_bias
    return GDN2Inputs(*(None if dx is None else dx.to(x.dtype) for dx, x in zip(grads, inputs, strict=False)))
