"""Depthwise causal convolution of width 2 to 4 over packed documents: mathematics, custom ops, public function.

With S = W - 1 taps into the past, every sequence is extended by S slots in front that hold its initial state. Window i
is then where tap i of every token lies in the extended sequence, the same formula for tokens and state:

    pre_t = bias + sum_i weight[:, i] * ext[t + i]        y_t = pre_t or silu(pre_t)        i = 0 .. S, token t at i = S

and the final state is the extended sequence's last S entries. A tap that would cross the start of a document reads
zero instead. Backward saves the inputs alone and computes pre again: it costs W multiply-adds per element, less than
reading it back would.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from .transforms import differentiable, once
from .validation import FLOAT_DTYPES, check_cu_seqlens, check_packing

__all__ = ["causal_conv1d"]

WIDTHS = (2, 3, 4)
SILU = ("silu", "swish")


def _layout(T, W, cu_seqlens):
    """Indices into the extended sequence [B, L]: windows (W of them, T positions each), heads and tails (the S slots
    of each initial and final state, sequence after sequence). Slices for B sequences of equal length, tensors for
    packed ones. No position occurs twice within one index, so adding at it needs no atomics and is deterministic."""
    S = W - 1
    if cu_seqlens is None:
        return [slice(i, i + T) for i in range(W)], slice(0, S), slice(T, T + S)
    device = cu_seqlens.device
    token = torch.arange(T, device=device)
    # The last sequence that begins at or before the token: right=True steps over empty ones.
    sequence = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    first = token + sequence * S
    slot = torch.arange(cu_seqlens.shape[0] - 1, device=device)[:, None] * S + torch.arange(S, device=device)
    heads, tails = (cu_seqlens[:-1, None] + slot).flatten(), (cu_seqlens[1:, None] + slot).flatten()
    return [first + i for i in range(W)], heads, tails


def _extend(x, initial_state, W, layout, dtype):
    """x [B, T, D], initial_state [N, D, S] or None -> [B, L, D] in the dtype of computation."""
    windows, heads, tails = layout
    B, T, D = x.shape
    slots = W - 1 if isinstance(heads, slice) else heads.shape[0]
    ext = x.new_zeros((B, T + slots, D), dtype=dtype)
    if initial_state is not None:
        ext[:, heads] = initial_state.to(dtype).transpose(1, 2).reshape(B, -1, D)
    ext[:, windows[-1]] = x.to(dtype)
    return ext


def _document_masks(resets, L, S, layout):
    """Where resets cut: for each window [B, T, 1] and for the tails [N, S, 1], True for what lies in an earlier
    document than the token itself, or than the sequence's last token. None where nothing can be cut."""
    windows, _, tails = layout
    if resets is None:
        return [None] * len(windows), None
    document = resets.new_zeros((resets.shape[0], L))
    document[:, windows[-1]] = resets
    document = document.cumsum(1)[..., None]
    token = document[:, windows[-1]]
    tail = document[:, tails].reshape(-1, S, 1)
    return [document[:, window] != token for window in windows[:-1]] + [None], tail != tail[:, -1:]


def _cut(x, mask):
    # Not a product with 0: what a reset hides may be inf or NaN and must not show through.
    return x if mask is None else x.masked_fill(mask, 0)


def _pre_activation(ext, weight_t, bias, windows, masks):
    """ext [B, L, D], weight_t [W, D], bias [D] or None -> [B, T, D]."""
    pre = _cut(ext[:, windows[0]], masks[0]) * weight_t[0]
    for tap, window, mask in zip(weight_t[1:], windows[1:], masks[1:], strict=True):
        pre.addcmul_(_cut(ext[:, window], mask), tap)
    return pre if bias is None else pre.add_(bias)


def _compute_dtype(x, weight, bias):
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return dtype if bias is None else torch.promote_types(dtype, bias.dtype)


def _output(x, dtype):
    """A contiguous copy that shares memory with nothing else, as a functional op must return."""
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True)


@torch.library.custom_op(
    "gdn2_titan::causal_conv1d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? cu_seqlens, "
    "Tensor? resets) -> (Tensor, Tensor)",
)
def _forward(x, weight, bias, silu, initial_state, cu_seqlens, resets):
    """y [B, T, D] and final_state [N, D, S], which the op computes whether or not anybody asks for it."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x.shape[1])
    # Autocast is on in an eager op body and off in a compiled graph: off in both, or the two differ.
    with torch.autocast(x.device.type, enabled=False):
        T, W = x.shape[1], weight.shape[1]
        dtype = _compute_dtype(x, weight, bias)
        layout = windows, _, tails = _layout(T, W, cu_seqlens)
        ext = _extend(x, initial_state, W, layout, dtype)
        masks, tail_mask = _document_masks(resets, ext.shape[1], W - 1, layout)
        weight_t = weight.to(dtype).t().contiguous()
        pre = _pre_activation(ext, weight_t, None if bias is None else bias.to(dtype), windows, masks)
        y = torch.nn.functional.silu(pre, inplace=True) if silu else pre
        final_state = _cut(ext[:, tails].reshape(-1, W - 1, x.shape[2]), tail_mask)
        return y.to(x.dtype), _output(final_state.transpose(1, 2), x.dtype)


@_forward.register_fake
def _(x, weight, bias, silu, initial_state, cu_seqlens, resets):
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((N, x.shape[2], weight.shape[1] - 1))


@torch.library.custom_op(
    "gdn2_titan::causal_conv1d_backward",
    mutates_args=(),
    schema="(Tensor? dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, bool silu, "
    "Tensor? initial_state, Tensor? cu_seqlens, Tensor? resets) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(dy, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens, resets):
    """dx [B, T, D], dweight [D, W], dbias [D] and dinitial_state [N, D, S], the last two empty where there was none."""
    with torch.autocast(x.device.type, enabled=False):
        B, T, D = x.shape
        W = weight.shape[1]
        dtype = _compute_dtype(x, weight, bias)
        layout = windows, heads, tails = _layout(T, W, cu_seqlens)
        ext = _extend(x, initial_state, W, layout, dtype)
        masks, tail_mask = _document_masks(resets, ext.shape[1], W - 1, layout)
        weight_t = weight.to(dtype).t().contiguous()
        dpre = torch.zeros_like(x, dtype=dtype) if dy is None else dy.to(dtype)
        if silu:
            pre = _pre_activation(ext, weight_t, None if bias is None else bias.to(dtype), windows, masks)
            gate = pre.sigmoid()
            dpre = dpre * gate * (1 + pre * (1 - gate))

        dext = torch.zeros_like(ext)
        dweight_t = torch.empty_like(weight_t)
        for i, (window, mask) in enumerate(zip(windows, masks, strict=True)):
            dweight_t[i] = (dpre * _cut(ext[:, window], mask)).sum((0, 1))
            dext[:, window] += _cut(dpre * weight_t[i], mask)
        if dfinal_state is not None:
            dext[:, tails] += _cut(dfinal_state.to(dtype).transpose(1, 2), tail_mask).reshape(B, -1, D)

        dx = _output(dext[:, windows[-1]], x.dtype)
        dweight = _output(dweight_t.t(), weight.dtype)
        dbias = x.new_empty(0) if bias is None else dpre.sum((0, 1)).to(bias.dtype)
        if initial_state is None:
            return dx, dweight, dbias, x.new_empty(0)
        dinitial_state = dext[:, heads].reshape(-1, W - 1, D).transpose(1, 2)
        return dx, dweight, dbias, _output(dinitial_state, initial_state.dtype)


@_backward.register_fake
def _(dy, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens, resets):
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    dinitial_state = x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dinitial_state


def _setup_context(ctx, inputs, output):
    x, weight, bias, silu, initial_state, cu_seqlens, resets = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens, resets)
    ctx.silu = silu


def _autograd(ctx, dy, dfinal_state):
    x, weight, bias, initial_state, cu_seqlens, resets = ctx.saved_tensors
    if dy is None and dfinal_state is None:
        return None, None, None, None, None, None, None
    dx, dweight, dbias, dinitial_state = _backward_once(
        dy, dfinal_state, x, weight, bias, ctx.silu, initial_state, cu_seqlens, resets
    )
    if bias is None:
        dbias = None
    if initial_state is None:
        dinitial_state = None
    return dx, dweight, dbias, None, dinitial_state, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
_differentiable = differentiable(_forward, _setup_context, _autograd)
_backward_once = once(_backward, "causal_conv1d")


@register_flop_formula(torch.ops.gdn2_titan.causal_conv1d)
def _forward_flops(x_shape, weight_shape, *args, **kwargs):
    B, T, D = x_shape
    return 2 * B * T * D * weight_shape[1]


@register_flop_formula(torch.ops.gdn2_titan.causal_conv1d_backward)
def _backward_flops(dy_shape, dfinal_state_shape, x_shape, weight_shape, *args, **kwargs):
    return 2 * _forward_flops(x_shape, weight_shape)


def _check_inputs(x, weight, bias, activation, initial_state, cu_seqlens, resets):
    """Shapes, dtypes and devices only, so that it traces under torch.compile and costs no host synchronisation."""
    floats = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    tensors = floats | {"cu_seqlens": cu_seqlens, "resets": resets}
    for name, tensor in tensors.items():
        if tensor is None and name not in ("x", "weight"):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
        if name in floats and tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be float16, bfloat16, float32 or float64")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on x's device {x.device}")
    if activation not in (None, *SILU):
        raise ValueError(f"activation is {activation!r}; it must be None, 'silu' or 'swish'")
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [B, T, D], each at least 1")
    B, T, D = x.shape
    if weight.ndim != 2 or weight.shape[0] != D or weight.shape[1] not in WIDTHS:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [D, W] with x's D = {D} and W 2, 3 or 4")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [D] with x's D = {D}")
    N = check_packing("x", B, T, cu_seqlens, resets)
    if initial_state is not None:
        if initial_state.dtype != x.dtype:
            raise TypeError(f"initial_state has dtype {initial_state.dtype}; it must be x's dtype {x.dtype}")
        shape = (N, D, weight.shape[1] - 1)
        if initial_state.shape != shape:
            raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}; it must be [N, D, W-1] = {shape}")


def causal_conv1d(
    x,
    weight,
    bias=None,
    activation=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    resets=None,
):
    """Depthwise causal convolution over time, y_t = act(bias + sum_i weight[:, i] * x_{t - (W - 1) + i}).

    Args:
        x: [B, T, D], float16, bfloat16, float32 or float64, any T >= 1.
        weight: [D, W] with W 2, 3 or 4; column W - 1 multiplies the current token. Any of x's dtypes, not
            necessarily the same one.
        bias: [D] or None, any of x's dtypes.
        activation: None, "silu" or "swish" (the same).
        initial_state: [N, D, W - 1] in x's dtype, the last W - 1 inputs before each sequence, oldest first; None for
            zeros. N is B, or the number of packed sequences.
        output_final_state: whether to return the state at the end of each sequence.
        cu_seqlens: [N + 1] int32 or int64, bounds of sequences packed end to end along T, from 0 to T; B must be 1.
            Each starts from zeros or its own initial state. A sequence may be empty: its state passes through. The op
            reads the values on the host to check them; `resets` needs no such synchronisation.
        resets: [B, T] bool, True where a token begins a new document: no tap reaches a token before it, nor the
            initial state, and the final state holds zeros for tokens of earlier documents than the last token's.

    Returns:
        y [B, T, D] in x's dtype, and final_state [N, D, W - 1] in x's dtype or None. Computed in float32, or float64
        if any of x, weight and bias is. Both are differentiable, once, in x, weight, bias and initial_state; each
        gradient has the dtype of its input.

    Raises:
        TypeError: an argument is no tensor or has a wrong dtype.
        ValueError: a wrong shape, device, activation, or cu_seqlens that do not run from 0 to T without falling.
    """
    _check_inputs(x, weight, bias, activation, initial_state, cu_seqlens, resets)
    y, final_state = _differentiable(x, weight, bias, activation in SILU, initial_state, cu_seqlens, resets)
    return y, final_state if output_final_state else None
