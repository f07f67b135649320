"""The formulas of benchmarks/parallel_costs.py against small runs, and the document made of them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYOUTS = ("HSDP 2 x 2", "FSDP 2 x TP 2", "FSDP 2 x PP 2")  # every dimension, and both habits of FSDP
BLOCKS = ("a block", "a block, TP 2")
SENT = {
    "HSDP 2 x 2": {"shard all-gather", "shard reduce-scatter", "replicate all-reduce"},
    "FSDP 2 x TP 2": {
        "shard all-gather", "shard reduce-scatter", "tp all-gather", "tp reduce-scatter", "tp all-reduce"
    },
    "FSDP 2 x PP 2": {"shard all-gather", "shard reduce-scatter", "pp send"},
}  # fmt: skip


def plan(*arguments):
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "parallel_plan.py"), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def checked():
    """{(layout, quantity): (formula, measured, "n of n ranks")}."""
    run = plan("--check", *BLOCKS, *LAYOUTS)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in run.stdout.splitlines()[2:]]
    return {(layout, quantity): rest for layout, quantity, *rest in rows}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_optimizer_states_and_each_collective_have_the_formulas_bytes_on_every_rank(checked, layout):
    found = {quantity: rest for (name, quantity), rest in checked.items() if name == layout}
    assert found.keys() == {"parameters", "optimizer bytes"} | SENT[layout]
    for quantity, (formula, measured, ranks) in found.items():
        assert formula == measured != "0" and ranks == "4 of 4 ranks", quantity


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_what_a_block_saves_for_backward_has_the_formulas_bytes_under_every_checkpointing(checked, block):
    found = {quantity: rest for (name, quantity), rest in checked.items() if name == block}
    assert len(found) == 6
    for quantity, (formula, measured, _) in found.items():
        assert formula == measured, quantity


@pytest.mark.slow
def test_the_document_has_the_plans_that_the_formulas_give():
    run = plan()
    assert run.returncode == 0
    assert run.stdout.strip() in (ROOT / "docs" / "parallelism.md").read_text()
