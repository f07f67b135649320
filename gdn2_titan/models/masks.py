"""Who may look at whom in the softmax layers: causal, within a window, within a document."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from gdn2_titan.ops.context_parallel.layout import SequenceShards
from gdn2_titan.ops.dispatch import triton_serves_device

__all__ = ["attention_mask", "context_mask", "continued_mask", "reach"]


def _visible(query, key, window):
    """query and key: positions, any broadcastable shapes. window None: all of the past."""
    visible = key <= query
    return visible if window is None else visible & (query - key < window)


def _surely(condition):
    """Whether it holds of sizes, as far as they are known. A compiler for whom one is open is not asked: its graph
    would serve only one of the cases."""
    # While a graph is traced, a condition of open sizes passes for a bool.
    if isinstance(condition, bool) and not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy, which takes a second

    return statically_known_true(condition)


def _is_dense(device, backend):
    # Compiled, flex attention is a kernel in Triton; on Apple's GPUs there is none.
    return device.type in ("cpu", "mps") or not triton_serves_device(device, backend)


@functools.cache
def _compiled_block_mask():
    return torch.compile(create_block_mask)  # eager, it would build the dense mask first


def _block_mask(batch, length, window, documents, device, create=create_block_mask):
    def mask_mod(b, h, query, key):
        visible = _visible(query, key, window)
        return visible if documents is None else visible & (documents[b, query] == documents[b, key])

    return create(mask_mod, None if documents is None else batch, None, length, length, device=device)


def attention_mask(
    batch: int, length: int, window: int | None, resets: Tensor | None, device: torch.device, backend: str = "auto"
) -> Tensor | BlockMask | None:
    """The mask of one kind of softmax layer, shared by all layers of the kind.

    window: tokens a query sees, itself included; None for all. resets: bool [B, T] or None; attention stays within
    a document. Returns None where plain causal attention is meant, a bool tensor [B or 1, 1, T, T] for
    ``scaled_dot_product_attention`` where there is or shall be (``backend``) no Triton, else a BlockMask.
    """
    if window is not None and _surely(window >= length):
        window = None
    documents = None if resets is None else resets.long().cumsum(1)
    if _is_dense(device, backend):
        if window is None and documents is None:
            return None
        positions = torch.arange(length, device=device)[None]
        return _dense_mask_of_rows(window, positions, positions, documents, documents)
    return _block_mask(batch, length, window, documents, device, _compiled_block_mask())


def continued_mask(
    length: int, kept: int, window: int | None, seen: int | Tensor, resets: Tensor | None, device: torch.device
) -> Tensor | None:
    """The mask of one kind of softmax layer for ``length`` tokens after those that its state comes from.

    kept: keys in the state, 0 where there is none. seen: tokens of its last document that a row has seen, an int or
    int64 [B]; in a row that has seen fewer than are kept, the last of them are its. resets: bool [B, length] or None.
    Returns a bool tensor [B or 1, 1, length, keys], on any device, whose keys are those of the state and then those of
    the tokens themselves; None where that is plain causal attention without a state, or one token that sees all keys.
    """
    plain = length == 1 or (kept == 0 and (window is None or length <= window))
    if plain and resets is None and isinstance(seen, int):
        return None
    keys = torch.arange(-kept, length, device=device)[None] + (seen if isinstance(seen, int) else seen[:, None])
    if resets is None:
        return _dense_mask_of_rows(window, keys[:, kept:], keys, None, None)
    documents = resets.long().cumsum(1)
    # What the state holds belongs to document 0.
    return _dense_mask_of_rows(window, keys[:, kept:], keys, documents, F.pad(documents, (kept, 0)))


def reach(window: int | None, length: int, shards: SequenceShards) -> int | None:
    """Tokens before each of its segments whose keys and values a rank needs, or None where it needs them all.

    length: tokens that a rank has, T_local. A window that looks back further than one segment is served by gathering.
    """
    return None if window is None or window - 1 > length // shards.per_rank else window - 1


def context_mask(
    batch: int, length: int, window: int | None, documents: Tensor | None, shards: SequenceShards,
    device: torch.device, backend: str = "auto",
) -> Tensor | BlockMask:  # fmt: skip
    """``attention_mask`` for a rank that has ``length`` tokens of every sequence, by their places in the whole of it.

    documents: int64 [B, T], the document of every token of all ranks, or None. With the keys of all T tokens, queries
    are [B, T_local] and the mask is [B or 1, 1, T_local, T]. With a ``reach``, each of the n segments is a row of the
    batch with the tokens before it, and the mask is [B * n or 1, 1, T_local / n, reach + T_local / n]. Always a mask,
    never None: where the queries are not the first tokens, plain causal attention is none for the kernels.
    """
    rows = _context_rows(batch, length, window, documents, shards, device)
    if _is_dense(device, backend):
        return _dense_mask_of_rows(window, *rows)
    return _block_mask_of_rows(window, *rows, _compiled_block_mask())


def _context_rows(batch, length, window, documents, shards, device):
    """For every row of ``context_mask``: positions of its queries and of its keys, below 0 before the sequence begins,
    and their documents or None. One row of positions without documents is for all of the batch."""
    positions = shards.positions(length, device)
    past = reach(window, length, shards)
    if past is None:
        queries, keys = positions[None], torch.arange(length * shards.size, device=device)[None]
    else:
        queries = positions.view(shards.per_rank, -1)
        keys = queries[:, :1] + torch.arange(-past, queries.shape[1], device=device)
    query_documents = key_documents = None
    if documents is not None:
        query_documents, key_documents = (documents[:, at.clamp_min(0)].flatten(0, 1) for at in (queries, keys))
    if documents is not None or len(queries) > 1:
        queries, keys = queries.repeat(batch, 1), keys.repeat(batch, 1)
    return queries, keys, query_documents, key_documents


def _dense_mask_of_rows(window, queries, keys, query_documents, key_documents):
    mask = _visible(queries[:, :, None], keys[:, None, :], window) & (keys >= 0)[:, None, :]
    if query_documents is not None:
        mask = mask & (query_documents[:, :, None] == key_documents[:, None, :])
    return mask[:, None]


def _block_mask_of_rows(window, queries, keys, query_documents, key_documents, create=create_block_mask):
    (rows, length), key_length = queries.shape, keys.shape[1]
    query_row, key_row = (length, key_length) if rows > 1 else (0, 0)
    queries, keys = queries.flatten(), keys.flatten()
    if query_documents is not None:
        query_documents, key_documents = query_documents.flatten(), key_documents.flatten()

    def mask_mod(b, h, query, key):
        query, key = b * query_row + query, b * key_row + key  # one row: whatever b is
        visible = _visible(queries[query], keys[key], window) & (keys[key] >= 0)
        return visible if query_documents is None else visible & (query_documents[query] == key_documents[key])

    return create(mask_mod, rows if rows > 1 else None, None, length, key_length, device=queries.device)
