"""What ranks receive under context parallelism, counted by benchmarks/context_parallel_bytes.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gdn2_titan.ops.context_parallel.exchange import choose
from gdn2_titan.ops.context_parallel.layout import LAYOUTS, SequenceShards

COUNTER = Path(__file__).parents[1] / "benchmarks" / "context_parallel_bytes.py"
FORMS = ("gather", "scan")
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


def test_a_number_of_ranks_that_is_no_power_of_two_gathers():
    for size in (3, 6, 12):
        assert choose(SequenceShards("", 0, size, 1), 64 << 16, 64 << 16, False) == "gather"
