"""What ranks receive under context parallelism, counted by benchmarks/context_parallel_bytes.py, and its cost model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gdn2_titan.ops import exchange_gather, exchange_scan
from gdn2_titan.ops.exchange_cost import choose, launches, seconds
from gdn2_titan.ops.shards import LAYOUTS, SequenceShards

COUNTER = Path(__file__).parents[1] / "benchmarks" / "context_parallel_bytes.py"
FORMS = {"gather": exchange_gather, "scan": exchange_scan}
EVERY = [(ranks, layout, form) for ranks in (2, 4, 8) for layout in LAYOUTS for form in FORMS]


@pytest.fixture(scope="module")
def counted():
    command = [sys.executable, "-W", "ignore", str(COUNTER), "--json"]
    rows = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout)
    return {(row["ranks"], row["layout"], row["exchange"], row["final"]): row for row in rows}


@pytest.mark.parametrize("ranks, layout, form", EVERY)
@pytest.mark.parametrize("final", [False, True])
def test_the_rank_that_receives_most_receives_the_formulas_bytes_at_any_length(counted, ranks, layout, form, final):
    row = counted[ranks, layout, form, final]
    assert len(row["counted"]) == 2
    assert row["counted"] == [row["formula"]] * 2
    assert min(row["formula"]) > 0


@pytest.mark.parametrize("ranks, layout, form", EVERY)
def test_the_gradient_of_the_final_state_costs_an_all_reduce_of_one_state(counted, ranks, layout, form):
    row = counted[ranks, layout, form, True]
    assert row["reduced"] == row["state"]
    assert counted[ranks, layout, form, False]["reduced"] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_receive_three_quarters_of_what_flash_linear_attentions_do_and_from_8_on_a_scan_less_than_half(
    counted, layout
):
    for ranks in (2, 4, 8):
        assert counted[ranks, layout, "gather", False]["ratio"] <= 0.75
        assert counted[ranks, layout, "scan", False]["ratio"] <= (0.5 if ranks == 8 else 0.75)


IDLE = ("aten._unsafe_view", "aten.new_empty", "gdn2_titan.after")  # no kernel; in a scan what is ordered is empty


class Launches(TorchDispatchMode):
    """Counts operators that do work; collectives return zeros, so that one process can be any rank."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if name == "_c10d_functional.all_gather_into_tensor_coalesced":
            return [x.new_zeros(args[1] * x.shape[0], *x.shape[1:]) for x in args[0]]
        if name == "_c10d_functional.all_to_all_single":
            return args[0].new_zeros(sum(args[1]))
        if name == "_c10d_functional.wait_tensor":
            return args[0]
        self.count += not func.is_view and name not in IDLE
        return func(*args, **(kwargs or {}))


def launched(form, shards):
    """(forward, backward) of one rank."""
    M, D = torch.zeros(shards.per_rank, 1, 2, 4, 4), torch.zeros(shards.per_rank, 1, 2, 4, 3)
    with Launches() as forward:
        pending = form.send(M, D, shards, False)
        *_, kept = form.receive(pending, M, D, shards, False)
    with Launches() as backward:
        form.receive_back(form.send_back(D, shards), D, kept, shards)
    return forward.count, backward.count


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_rank", [1, 2])
@pytest.mark.parametrize("size", [2, 4, 8, 32])
def test_the_cost_model_counts_the_kernels_of_the_busiest_rank(form, per_rank, size):
    ranks = [launched(FORMS[form], SequenceShards("", rank, size, per_rank)) for rank in range(size)]
    found = max(forward for forward, _ in ranks) + max(backward for _, backward in ranks)
    assert launches(form, size, per_rank) == found


@pytest.mark.parametrize("per_rank", [1, 2])
def test_the_form_that_is_chosen_is_the_faster_one_by_the_model_and_scans_are_for_powers_of_two(per_rank):
    chosen = {}
    for size in (2, 3, 4, 6, 8, 16, 64, 1024):
        for heads in (1, 4, 16, 64):
            form = choose(SequenceShards("", 0, size, per_rank), heads << 16, heads << 16, False)
            chosen[size, heads] = form
            if size in (3, 6):
                assert form == "gather"
            else:
                costs = {name: seconds(name, size, per_rank, heads << 16, heads << 16) for name in FORMS}
                assert costs[form] == min(costs.values())
    assert chosen[4, 1] == "gather" and chosen[64, 1] == chosen[8, 64] == "scan"
