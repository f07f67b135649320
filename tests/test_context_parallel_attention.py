"""Softmax attention over sequences that ranks share, on processes over gloo, compared with one process."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention.flex_attention import create_mask, flex_attention

from gdn2_titan.models import attention
from gdn2_titan.models.attention import Attention, rotary_angles
from gdn2_titan.models.masks import _block_mask_of_rows, _context_rows, attention_mask, context_mask, reach
from gdn2_titan.ops.context_parallel.layout import LAYOUTS, SequenceShards
from tests.context_parallel_cases import Received, part, summed
from tests.model_cases import some_resets, visible_by_hand
from tests.processes import run

CPU = torch.device("cpu")
T, HIDDEN, HEADS = 48, 16, 4


def documents_of(resets):
    return None if resets is None else resets.long().cumsum(1)


def keys_of_rows(shards, window, length):
    """For every segment of the rank as a row, the positions of its keys; for a rank that has all keys, one row."""
    past, size = reach(window, length, shards), length // shards.per_rank
    if past is None:
        return None
    return [range(i * size - past, (i + 1) * size) for i in shards.segments]


def mask_by_hand(B, shards, window, resets):
    """The rank's part of a whole mask made by hand: [B * rows, 1, queries, keys]."""
    length = T // shards.size
    whole, positions = visible_by_hand(B, T, window, resets), shards.positions(length)
    rows = keys_of_rows(shards, window, length)
    if rows is None:
        return whole[:, :, positions]
    found = []
    for row in whole:
        for queries, keys in zip(positions.view(shards.per_rank, -1), rows, strict=True):
            visible = [
                row[0, queries, key] if key >= 0 else torch.zeros(len(queries), dtype=torch.bool) for key in keys
            ]
            found.append(torch.stack(visible, 1)[None])
    return torch.stack(found)


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 7, 13, 40, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_and_flex_masks_show_a_rank_what_the_whole_sequence_allows(layout, window, with_resets):
    B = 2
    resets = some_resets(B, T) if with_resets else None
    for rank in range(4):
        shards = SequenceShards("", rank, 4, LAYOUTS.index(layout) + 1)
        want = mask_by_hand(B, shards, window, resets)
        arguments = B, T // 4, window, documents_of(resets), shards, CPU
        assert torch.equal(context_mask(*arguments).expand(want.shape), want)
        block = _block_mask_of_rows(window, *_context_rows(*arguments))
        assert torch.equal(create_mask(block.mask_mod, len(want), 1, *want.shape[2:], device="cpu"), want)


def test_only_a_window_that_looks_further_back_than_a_segment_needs_the_keys_of_all():
    contiguous, head_tail = (SequenceShards("", 0, 4, per_rank) for per_rank in (1, 2))
    assert [reach(w, 12, contiguous) for w in (None, 1, 12, 13, 14)] == [None, 0, 11, 12, None]
    assert [reach(w, 12, head_tail) for w in (None, 1, 6, 7, 8)] == [None, 0, 5, 6, None]


def whole_and_part(built, x, shards, window, resets, dy):
    """Output and gradients of x and of the parameters: in one process, and this rank's."""
    results = []
    for mine in (False, True):
        built.shards = shards if mine else None
        built.zero_grad()
        positions = shards.positions(T // shards.size) if mine else torch.arange(T)
        mask = (
            context_mask(len(x), T // shards.size, window, documents_of(resets), shards, CPU)
            if mine
            else attention_mask(len(x), T, window, resets, CPU)
        )
        inputs = (part(x, shards) if mine else x.clone()).requires_grad_()
        y = built(inputs, rotary_angles(positions, HIDDEN // HEADS, 10_000.0), mask)
        y.backward(part(dy, shards) if mine else dy)
        results.append({"y": y.detach(), "dx": inputs.grad} | {n: p.grad.clone() for n, p in built.named_parameters()})
    return results


def _equals_one_process(rank, world):
    torch.manual_seed(0)
    B = 2
    x, dy = torch.randn(2, B, T, HIDDEN, dtype=torch.float64)
    for kv_heads, window, with_resets in itertools.product((4, 2), (None, 1, 2, 6, 13, 30), (False, True)):
        built = Attention(HIDDEN, HEADS, kv_heads, window).double()
        resets = some_resets(B, T) if with_resets else None
        for layout in LAYOUTS:
            shards = SequenceShards.of(dist.group.WORLD, layout)
            whole, mine = whole_and_part(built, x, shards, window, resets, dy)
            for name, want in whole.items():
                want = part(want, shards) if name in ("y", "dx") else want
                got = mine[name] if name in ("y", "dx") else summed(mine[name])
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_outputs_and_gradients_equal_one_process_full_windowed_and_within_documents(tmp_path, world):
    run(_equals_one_process, world, tmp_path / "store", world)


def _bytes(rank, world):
    B, kv_heads, size = 3, 2, 4  # of a head
    for layout, window, length in itertools.product(LAYOUTS, (None, 5), (16, 64)):
        shards = SequenceShards.of(dist.group.WORLD, layout)
        built = Attention(HIDDEN, HEADS, kv_heads, window)
        built.shards = shards
        x = torch.randn(B, length, HIDDEN)
        angles = rotary_angles(shards.positions(length), size, 10_000.0)
        mask = context_mask(B, length, window, None, shards, CPU)
        per_token = B * 2 * kv_heads * size * 4
        if window is None:  # every rank's keys and values, and back the gradients that all ranks have of one's own
            forward = backward = (world - 1) * length * per_token
        else:
            head_tail = layout == "head_tail"
            forward = ((rank > 0) + (rank < world - 1) * head_tail) * (window - 1) * per_token
            backward = ((rank < world - 1) + (rank > 0) * head_tail) * (window - 1) * per_token
        with Received(rank) as received:
            y = built(x, angles, mask)
        assert (received.calls, received.bytes) == (1, forward)
        with Received(rank) as received:
            y.sum().backward()
        assert (received.calls, received.bytes) == (1, backward)


def test_a_window_brings_its_tokens_and_full_attention_all_tokens(tmp_path):
    run(_bytes, 4, tmp_path / "store", 4)


def _flex(rank):
    attention._compiled_flex_attention = lambda: flex_attention  # eager: exact and on any device
    torch.manual_seed(0)
    x = torch.randn(2, T, HIDDEN)
    for layout, window, with_resets in itertools.product(LAYOUTS, (None, 7), (False, True)):
        shards = SequenceShards.of(dist.group.WORLD, layout)
        built = Attention(HIDDEN, HEADS, 2, window)
        resets = some_resets(2, T) if with_resets else None
        rows = _context_rows(2, T // 2, window, documents_of(resets), shards, CPU)
        with torch.no_grad():
            whole = built(x, rotary_angles(torch.arange(T), 4, 1e4), attention_mask(2, T, window, resets, CPU))
            built.shards = shards
            angles = rotary_angles(shards.positions(T // 2), 4, 1e4)
            got = built(part(x, shards), angles, _block_mask_of_rows(window, *rows))
        torch.testing.assert_close(got, part(whole, shards), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_through_flex_attention_outputs_are_those_of_one_process(tmp_path):
    run(_flex, 2, tmp_path / "store")
