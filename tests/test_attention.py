"""Softmax attention, its masks and its rotary positions, against a softmax written out and masks made by hand."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from gdn2_titan.models import attention
from gdn2_titan.models.attention import Attention, rotary_angles
from gdn2_titan.models.masks import _block_mask, attention_mask
from tests.model_cases import softmax_attention, some_resets, visible_by_hand

CPU = torch.device("cpu")


MASKS = {"causal": (None, False), "window": (3, False), "documents": (None, True), "window, documents": (5, True)}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_equals_a_softmax_written_out(mask, kv_heads):
    window, with_resets = MASKS[mask]
    torch.manual_seed(0)
    built = Attention(32, 4, kv_heads).double()
    B, T = 2, 13
    x = torch.randn(B, T, 32, dtype=torch.float64)
    resets = None
    if with_resets:
        resets = torch.zeros(B, T, dtype=torch.bool)
        resets[0, [0, 4, 5]] = resets[1, 9] = True
    got = built(x, rotary_angles(torch.arange(T), 8, 10_000.0), attention_mask(B, T, window, resets, CPU))
    # Angles are fp32.
    torch.testing.assert_close(got, softmax_attention(built, x, 4, kv_heads, window, resets), rtol=1e-5, atol=1e-6)


def test_rotary_positions_act_by_their_difference_only():
    torch.manual_seed(0)
    built = Attention(32, 4, 2).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    outs = [built(x, rotary_angles(torch.arange(9) + shift, 8, 10_000.0), None) for shift in (0, 37)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)
    stretched = built(x, rotary_angles(2 * torch.arange(9), 8, 10_000.0), None)
    assert (stretched - outs[0]).abs().max() > 1e-3


def test_rotary_positions_may_differ_between_rows():
    torch.manual_seed(0)
    built = Attention(32, 4).double()
    x = torch.randn(1, 9, 32, dtype=torch.float64).expand(2, 9, 32)
    positions = torch.stack([torch.arange(9), 2 * torch.arange(9)])
    both = built(x, rotary_angles(positions, 8, 10_000.0), None)
    for row, stride in enumerate((1, 2)):
        alone = softmax_attention(built, x[:1], 4, 4, stride=stride)
        torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-5, atol=1e-6)
    assert (both[0] - both[1]).abs().max() > 1e-3


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7, 30, 100])
def test_dense_and_flex_masks_show_what_causality_window_and_documents_allow(window, with_resets):
    B, T = 2, 30
    resets = some_resets(2, 60)[:, :T] if with_resets else None
    want = visible_by_hand(B, T, window, resets)
    dense = attention_mask(B, T, window, resets, CPU)
    if dense is None:  # plain causal attention
        dense = torch.ones(T, T, dtype=torch.bool).tril()
    assert torch.equal(dense.expand(B, 1, T, T), want)
    documents = None if resets is None else resets.long().cumsum(1)
    block = _block_mask(B, T, window, documents, "cpu")
    assert torch.equal(create_mask(block.mask_mod, B, 1, T, T, device="cpu"), want)


def test_flex_block_mask_leaves_out_whole_blocks_that_no_query_sees():
    T, window = 512, 64
    block = _block_mask(1, T, window, None, "cpu")
    blocks = block.to_dense()[0, 0].bool()  # 128 by 128
    assert torch.equal(blocks, torch.ones(4, 4, dtype=torch.bool).tril().triu(-1))
    want = create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < window), None, None, T, T, device="cpu")
    assert torch.equal(block.to_dense(), want.to_dense())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_through_flex_equals_attention_through_the_dense_mask(kv_heads, monkeypatch):
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: flex_attention)  # eager: exact and on any device
    torch.manual_seed(0)
    built = Attention(32, 4, kv_heads)
    B, T, window = 2, 30, 9
    x, resets = torch.randn(B, T, 32), some_resets(2, 60)[:, :T]
    angles = rotary_angles(torch.arange(T), 8, 10_000.0)
    documents = resets.long().cumsum(1)
    with torch.no_grad():
        got = built(x, angles, _block_mask(B, T, window, documents, "cpu"))
        want = softmax_attention(built, x, 4, kv_heads, window, resets)
        dense = built(x, angles, attention_mask(B, T, window, resets, CPU))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense, want, rtol=1e-4, atol=1e-5)
