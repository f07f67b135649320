"""Who may look at whom in the softmax layers: causal, within a window, within a document."""

import functools

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention.flex_attention import create_block_mask

__all__ = ["attention_mask"]


def _visible(query, key, window):
    """query and key: positions, any broadcastable shapes. window None: all of the past."""
    visible = key <= query
    return visible if window is None else visible & (query - key < window)


def _dense_mask(length, window, documents, device):
    position = torch.arange(length, device=device)
    mask = _visible(position[:, None], position[None, :], window)
    if documents is not None:
        mask = mask & (documents[:, :, None] == documents[:, None, :])  # [B, T, T]
    return mask.view(-1, 1, length, length)


@functools.cache
def _compiled_block_mask():
    return torch.compile(create_block_mask)  # eager, it would build the dense mask first


def _block_mask(batch, length, window, documents, device, create=create_block_mask):
    def mask_mod(b, h, query, key):
        visible = _visible(query, key, window)
        return visible if documents is None else visible & (documents[b, query] == documents[b, key])

    return create(mask_mod, None if documents is None else batch, None, length, length, device=device)


def attention_mask(batch, length, window, resets, device):
    """The mask of one kind of softmax layer, shared by all layers of the kind.

    window: tokens a query sees, itself included; None for all. resets: bool [B, T] or None; attention stays within
    a document. Returns None where plain causal attention is meant, a bool tensor [B or 1, 1, T, T] for
    ``scaled_dot_product_attention`` on CPU, a BlockMask for flex attention on other devices.
    """
    # A compiler for whom the length is open is not asked: its graph would serve only one of the cases.
    if window is not None and statically_known_true(window >= length):
        window = None
    documents = None if resets is None else resets.long().cumsum(1)
    if device.type == "cpu":
        if window is None and documents is None:
            return None
        return _dense_mask(length, window, documents, device)
    return _block_mask(batch, length, window, documents, device, _compiled_block_mask())
