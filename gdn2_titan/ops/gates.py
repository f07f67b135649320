"""From raw projections to what the recurrence reads: L2 norm, decay, sigmoid gates, resets; and back.

``activate`` is differentiable and serves the reference; the chunked kernel calls it without autograd and
``activate_backward`` for the gradients, so that only the raw projections need to be kept.
"""

import torch
import torch.nn.functional as F

__all__ = ["NORM_EPS", "activate", "activate_backward", "compute_dtype"]

NORM_EPS = 1e-6
# log1p(exp(x)) is exact to rounding below this and x above it, in fp32 as in fp64.
SOFTPLUS_THRESHOLD = 50.0


def compute_dtype(x):
    """State, decay and accumulators: fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _inverse_norm(x):
    return torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


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
        if dt_bias is not None:
            g = g + dt_bias.to(dtype).reshape(g.shape[2:])
        g = -A_log.to(dtype).exp()[:, None] * F.softplus(g, threshold=SOFTPLUS_THRESHOLD)
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
        x = g.to(dtype)
        if dt_bias is not None:
            x = x + dt_bias.to(dtype).reshape(x.shape[2:])
        dg = dg * -A_log.to(dtype).exp()[:, None]
        dA_log = (dg * F.softplus(x, threshold=SOFTPLUS_THRESHOLD)).sum((0, 1, 3))
        dg = dg * torch.sigmoid(x)
        if dt_bias is not None:
            ddt_bias = dg.sum((0, 1)).reshape(dt_bias.shape)
    if sigmoid:
        b, w = torch.sigmoid(b.to(dtype)), torch.sigmoid(w.to(dtype))
        db, dw = db * erase_scale * b * (1 - b), dw * w * (1 - w)
    return dq, dk, dg, db, dw, dA_log, ddt_bias
