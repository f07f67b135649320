"""The short convolution over sequences that ranks share, on processes over gloo, compared with one process."""

import itertools

import pytest
import torch
import torch.distributed as dist

from gdn2_titan.ops import causal_conv1d, context_parallel_conv1d
from gdn2_titan.ops.context_parallel.layout import LAYOUTS, SequenceShards
from tests import conv_cases
from tests.context_parallel_cases import Received, part, summed
from tests.gdn2_cases import slowly
from tests.processes import run

# Where documents begin, relative to the edge of each segment; None for no resets at all.
BEGINNINGS = (
    None, (), (0,), (-1,), (-2,), (-2, -1), (-1, 0), (-2, 0), (-3, -1), (-3, -2, -1, 0), (1,), (-1, 1), (2,),
)  # fmt: skip


def resets_at(offsets, B, T, size):
    """bool [B, T]: True at these places around every edge of segments, in every row but the first at half of them."""
    if offsets is None:
        return None
    resets = torch.zeros(B, T, dtype=torch.bool)
    for row in range(B):
        for edge in range(0, T, size * (1 + (row > 0))):
            for t in (edge + offset for offset in offsets):
                if 0 <= t < T:
                    resets[row, t] = True
    return resets


def assert_equals_one_process(shards, B, size, width, resets, bias=True, activation="silu"):
    T = size * shards.per_rank * shards.size
    whole = conv_cases.make(B=B, T=T, D=3, W=width, bias=bias, state=False)
    dy = conv_cases.output_gradients(whole["x"], whole["weight"])[0]
    y, _ = causal_conv1d(**whole | {"resets": resets}, activation=activation)
    grads = conv_cases.gradients(whole, y, dy)

    mine = whole | {"x": part(whole["x"].detach(), shards).requires_grad_()}
    parameters = mine["weight"], mine["bias"]
    local_resets = None if resets is None else part(resets, shards)
    got = context_parallel_conv1d(
        mine["x"], *parameters, activation, group=dist.group.WORLD, layout=shards.layout, resets=local_resets
    )
    found = conv_cases.gradients(mine, got, part(dy, shards))
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(got, part(y, shards), **exact)
    torch.testing.assert_close(found.pop("x"), part(grads["x"], shards), **exact)
    for name, share in found.items():
        torch.testing.assert_close(summed(share), grads[name], **exact, msg=lambda text: f"{name}: {text}")


def _equals_one_process(rank, world):
    for layout, width, offsets in itertools.product(LAYOUTS, (2, 3, 4), BEGINNINGS):
        shards = SequenceShards.of(dist.group.WORLD, layout)
        for B, size in ((1, 7), (3, 4), (2, width - 1)):
            T = size * shards.per_rank * world
            assert_equals_one_process(shards, B, size, width, resets_at(offsets, B, T, size))
    for layout in LAYOUTS:
        shards = SequenceShards.of(dist.group.WORLD, layout)
        assert_equals_one_process(shards, 2, 5, 4, None, bias=False, activation=None)


@pytest.mark.parametrize("world", [1, 2, *slowly(4)])
def test_outputs_and_gradients_equal_one_process_wherever_documents_begin(tmp_path, world):
    run(_equals_one_process, world, tmp_path / "store", world)


def _short_segments(rank, world):
    for layout, size, offsets in itertools.product(LAYOUTS, (1, 2, 3), BEGINNINGS):
        shards = SequenceShards.of(dist.group.WORLD, layout)
        for B in (1, 3):
            assert_equals_one_process(shards, B, size, 4, resets_at(offsets, B, size * shards.per_rank * world, size))


@pytest.mark.parametrize("world", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_segments_shorter_than_the_window_get_tokens_of_several_predecessors(tmp_path, world):
    run(_short_segments, world, tmp_path / "store", world)


def _hidden_tokens(rank):
    # The second document begins two tokens before the edge; all tokens before it are not finite.
    for layout in LAYOUTS:
        shards = SequenceShards.of(dist.group.WORLD, layout)
        T = 6 * shards.per_rank * 2
        x, resets = torch.ones(1, T, 2), torch.zeros(1, T, dtype=torch.bool)
        x[:, :4], resets[:, 4] = torch.nan, True
        x = part(x, shards).requires_grad_()
        y = context_parallel_conv1d(
            x, torch.ones(2, 4), group=dist.group.WORLD, layout=layout, resets=part(resets, shards)
        )
        later = shards.positions(x.shape[1]) >= 4
        assert y[:, later].isfinite().all() and not y[:, ~later].isfinite().any()
        y[:, later].sum().backward()
        assert x.grad.isfinite().all() and not x.grad[:, ~later].any()


def test_what_a_document_start_hides_does_not_show_through_even_if_it_is_not_finite(tmp_path):
    run(_hidden_tokens, 2, tmp_path / "store")


def _bytes(rank, world):
    B, D, width = 3, 5, 4
    for layout, with_resets in itertools.product(LAYOUTS, (False, True)):
        # The head's past is with the rank before, the tail's with the rank after, the last rank's tail's with itself.
        others = (rank > 0) + (rank < world - 1) * (layout == "head_tail")
        for T in (6, 64):
            x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
            resets = torch.zeros(B, T, dtype=torch.bool) if with_resets else None
            weight = torch.randn(D, width, dtype=torch.float64)
            with Received(rank) as forward:
                y = context_parallel_conv1d(x, weight, group=dist.group.WORLD, layout=layout, resets=resets)
            assert (forward.calls, forward.bytes) == (1, others * B * (width - 1) * (D + with_resets) * 8)
            with Received(rank) as backward:
                y.sum().backward()
            back = (rank < world - 1) + (rank > 0) * (layout == "head_tail")
            assert (backward.calls, backward.bytes) == (1, back * B * (width - 1) * (D + with_resets) * 8)


def test_a_rank_receives_the_window_from_its_neighbours_whatever_the_length(tmp_path):
    run(_bytes, 4, tmp_path / "store", 4)


def _refusals(rank):
    x, weight = torch.randn(1, 5, 2), torch.randn(2, 4)
    for changes, error in (
        ({"layout": "zigzag"}, "layout is 'zigzag'; it must be one of 'contiguous', 'head_tail'"),
        (
            {"layout": "head_tail"},
            "a rank has 5 tokens of a sequence; with layout 'head_tail' their number must be even",
        ),
        ({"resets": torch.zeros(1, 4, dtype=torch.bool)}, r"resets has shape \(1, 4\); it must be"),
    ):
        with pytest.raises(ValueError, match=f"^{error}"):
            context_parallel_conv1d(x, weight, group=dist.group.WORLD, **changes)


def test_what_cannot_be_split_is_refused_with_the_number(tmp_path):
    run(_refusals, 1, tmp_path / "store")
