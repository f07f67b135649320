"""The short convolution in plain PyTorch, for any device: the twin of the Triton kernels. ``api`` defines it.

With S = W - 1 taps into the past, every sequence is extended by S slots in front that hold its initial state. Window i
is then where tap i of every token lies in the extended sequence, the same formula for tokens and state:

    pre_t = bias + sum_i weight[:, i] * ext[t + i]        y_t = pre_t or silu(pre_t)        i = 0 .. S, token t at i = S

and the final state is the extended sequence's last S entries. A tap that would cross the start of a document reads
zero instead. Backward saves the inputs alone and computes pre again: it costs W multiply-adds per element, less than
reading it back would.
"""

import torch
from torch import Tensor

from ..elementwise import BATCH_INVARIANT, silu
from .arguments import ConvInputs

__all__ = ["backward", "forward", "update"]


def _indices(T, W, cu_seqlens):
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


def _extend(x, initial_state, W, indices, dtype):
    """x [B, T, D], initial_state [N, D, S] or None -> [B, L, D] in the dtype of computation."""
    windows, heads, tails = indices
    B, T, D = x.shape
    slots = W - 1 if isinstance(heads, slice) else heads.shape[0]
    ext = x.new_zeros((B, T + slots, D), dtype=dtype)
    if initial_state is not None:
        ext[:, heads] = initial_state.to(dtype).transpose(1, 2).reshape(B, slots, D)
    ext[:, windows[-1]] = x.to(dtype)
    return ext


def _document_masks(resets, L, S, indices):
    """Where resets cut: for each window [B, T, 1] and for the tails [N, S, 1], True for what lies in an earlier
    document than the token itself, or than the sequence's last token. None where nothing can be cut."""
    windows, _, tails = indices
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


def _output(x, dtype):
    """A contiguous copy that shares memory with nothing else, as a functional op must return."""
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True)


def _extended(inputs):
    """What forward and backward begin with, in the dtype of computation: the extended sequence and its indices, where
    resets cut, weight [W, D] and bias."""
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    if bias is not None:
        dtype = torch.promote_types(dtype, bias.dtype)
        bias = bias.to(dtype)
    W = weight.shape[1]
    indices = _indices(x.shape[1], W, inputs.cu_seqlens)
    ext = _extend(x, inputs.initial_state, W, indices, dtype)
    masks, tail_mask = _document_masks(inputs.resets, ext.shape[1], W - 1, indices)
    return ext, indices, masks, tail_mask, weight.to(dtype).t().contiguous(), bias


def forward(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and final_state [N, D, S], in x's dtype."""
    x = inputs.x
    ext, (windows, _, tails), masks, tail_mask, weight_t, bias = _extended(inputs)
    pre = _pre_activation(ext, weight_t, bias, windows, masks)
    if inputs.silu:
        pre = silu(pre) if inputs.backend == BATCH_INVARIANT else torch.nn.functional.silu(pre, inplace=True)
    final_state = _cut(ext[:, tails].reshape(-1, weight_t.shape[0] - 1, x.shape[2]), tail_mask)
    return pre.to(x.dtype), _output(final_state.transpose(1, 2), x.dtype)


def update(inputs: ConvInputs, state_indices: Tensor | None) -> Tensor:
    """y [B, T, D]; the initial state, or those of its blocks [D, S] that state_indices [N] names, becomes the final
    one. A sequence at block -1 is left out: its y is zero."""
    state = inputs.initial_state
    if state_indices is None:
        y, final_state = forward(inputs)
        state.copy_(final_state)
        return y
    blocks = state_indices.long()
    used = blocks >= 0
    y, final_state = forward(inputs._replace(initial_state=state[blocks.clamp_min(0)]))
    state[blocks[used]] = final_state[used]
    if inputs.cu_seqlens is not None:
        used = used.repeat_interleave(inputs.cu_seqlens.diff().long())[None]
    return torch.where(used.view(*used.shape, *[1] * (3 - used.ndim)), y, 0.0)


def backward(
    dy: Tensor | None, dfinal_state: Tensor | None, inputs: ConvInputs
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dx, dweight, dbias and dinitial_state in their inputs' shapes and dtypes, the last two None where there was
    none. dy [B, T, D] and dfinal_state [N, D, S], or None for zeros."""
    x, initial_state = inputs.x, inputs.initial_state
    B, T, D = x.shape
    ext, (windows, heads, tails), masks, tail_mask, weight_t, bias = _extended(inputs)
    dtype = ext.dtype
    dpre = torch.zeros_like(x, dtype=dtype) if dy is None else dy.to(dtype)
    if inputs.silu:
        pre = _pre_activation(ext, weight_t, bias, windows, masks)
        gate = pre.sigmoid()
        dpre = dpre * gate * (1 + pre * (1 - gate))

    dext = torch.zeros_like(ext)
    dweight_t = torch.empty_like(weight_t)
    for i, (window, mask) in enumerate(zip(windows, masks, strict=True)):
        dweight_t[i] = (dpre * _cut(ext[:, window], mask)).sum((0, 1))
        dext[:, window] += _cut(dpre * weight_t[i], mask)
    if dfinal_state is not None:
        dext[:, tails] += _cut(dfinal_state.to(dtype).transpose(1, 2), tail_mask).reshape(B, ext.shape[1] - T, D)

    dx = _output(dext[:, windows[-1]], x.dtype)
    dweight = _output(dweight_t.t(), inputs.weight.dtype)
    dbias = None if bias is None else dpre.sum((0, 1)).to(inputs.bias.dtype)
    if initial_state is None:
        return dx, dweight, dbias, None
    dinitial_state = dext[:, heads].reshape(-1, weight_t.shape[0] - 1, D).transpose(1, 2)
    return dx, dweight, dbias, _output(dinitial_state, initial_state.dtype)
