"""From raw projections to what the recurrence reads: L2 norm, decay, sigmoid gates, resets; and back.

``activate`` is differentiable and serves the reference; the chunked kernel calls it without autograd and
``activate_backward`` for the gradients, so that only the raw projections need to be kept.
"""

import math

import torch
import torch.nn.functional as F

__all__ = ["NORM_EPS", "STRONG", "activate", "activate_backward", "compute_dtype", "log_decay"]

NORM_EPS = 1e-6
# Of A_log, what is above it goes into the argument of softplus, see ``_gate``.
STRONG = 50.0
# log1p(exp(x)) is exact to rounding below this and x above it, in fp32 as in fp64.
SOFTPLUS_THRESHOLD = 50.0


def compute_dtype(x):
    """State, decay and accumulators: fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _inverse_norm(x):
    return torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


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
    rate = A_log.clamp(faint, STRONG).exp()
    stretch = (faint - A_log).relu().clamp(max=-faint).neg().exp()
    strong = A_log > STRONG
    x = g * stretch + torch.where(strong, A_log.clamp(max=info.max), 0.0)
    rest = torch.where(strong, -STRONG, 0.0)  # not A_log - STRONG, which is rounded
    if dt_bias is not None:
        rest = rest + dt_bias.to(g.dtype).reshape(g.shape[2:]) * stretch
    return rate, stretch, (x + rest).clamp(max=info.max)


def log_decay(g, A_log, dt_bias):
    """-exp(A_log) * softplus(g + dt_bias) in g's dtype, -inf where that is too large a number; shapes as in
    ``activate``, g with any K."""
    rate, _, x = _gate(g, A_log, dt_bias)
    return -rate * F.softplus(x, threshold=SOFTPLUS_THRESHOLD)


def activate(q, k, g, b, w, A_log, dt_bias, resets, *, l2norm, gate, sigmoid, erase_scale):
    """Apply the options of the op to its raw inputs, in the compute dtype.

    q, k, g, b [B, T, H, K]; w [B, T, HV, V]; A_log [H]; dt_bias [H, K] or [H * K] or None; resets bool [B, T] or None.
    Returns (q, k, g, b, w). A reset is a decay of -inf: exp(-inf) = 0 forgets the state before the token exactly.
    """
    dtype = compute_dtype(q)
    q, k, g, b, w = (x.to(dtype) for x in (q, k, g, b, w))
    if l2norm:
        q, k = q * _inverse_norm(q), k * _inverse_norm(k)
    if gate:
        g = log_decay(g, A_log, dt_bias)
    if sigmoid:
        b, w = erase_scale * torch.sigmoid(b), torch.sigmoid(w)
    if resets is not None:
        g = g.masked_fill(resets[:, :, None, None], -torch.inf)
    return q, k, g, b, w


def _l2norm_backward(x, dy):
    r = _inverse_norm(x)
    return r * (dy - x * (r * r * (x * dy).sum(-1, keepdim=True)))


def activate_backward(grads, q, k, g, b, w, A_log, dt_bias, resets, *, l2norm, gate, sigmoid, erase_scale):
    """Gradients of ``activate``. grads: (dq, dk, dg, db, dw) of its outputs; the rest as given to it.

    Returns (dq, dk, dg, db, dw, dA_log, ddt_bias) in the compute dtype, dA_log and ddt_bias None where absent.
    """
    dq, dk, dg, db, dw = grads
    dtype = dq.dtype
    dA_log = ddt_bias = None
    if resets is not None:
        dg = dg.masked_fill(resets[:, :, None, None], 0)
    if l2norm:
        dq, dk = _l2norm_backward(q.to(dtype), dq), _l2norm_backward(k.to(dtype), dk)
    if gate:
        rate, stretch, x = _gate(g.to(dtype), A_log, dt_bias)
        dg = dg * -rate
        dA_log = (dg * F.softplus(x, threshold=SOFTPLUS_THRESHOLD)).sum((0, 1, 3))
        dg = dg * torch.sigmoid(x) * stretch
        if dt_bias is not None:
            ddt_bias = dg.sum((0, 1)).reshape(dt_bias.shape)
    if sigmoid:
        b, w = torch.sigmoid(b.to(dtype)), torch.sigmoid(w.to(dtype))
        db, dw = db * erase_scale * b * (1 - b), dw * w * (1 - w)
    return dq, dk, dg, db, dw, dA_log, ddt_bias
