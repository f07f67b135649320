"""The formulas of benchmarks/context_parallel_simulation.py, and the document made of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from gdn2_titan.ops.exchange_cost import received

ROOT = Path(__file__).parents[1]
SIMULATION = ROOT / "benchmarks" / "context_parallel_simulation.py"
MIB = 2**20


@pytest.fixture(scope="module")
def simulation():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SIMULATION.parent))
        import context_parallel_simulation

        yield context_parallel_simulation


@pytest.fixture(scope="module")
def bytes_of(simulation):
    """Bytes that a scheme's ranks receive: its exchange on a device that computes in no time, at a byte a second."""
    device = simulation.Device("", dict.fromkeys(("segment", "forward", "backward", "read", "read_transposed"), 0.0)
                               | {"product": 0.0}, 1e30, 2, 0.0)  # fmt: skip
    link = simulation.Link(0.0, 0.0, 1.0)
    return lambda scheme, tokens, ranks, *more: scheme(device, link, tokens, ranks, *more).exchange


@pytest.mark.parametrize("form", ["gather", "scan"])
@pytest.mark.parametrize("per_rank", [1, 2])
@pytest.mark.parametrize("ranks", [2, 8, 1024])
def test_a_handoff_exchanges_the_bytes_of_the_cost_model_whatever_the_length(
    simulation, bytes_of, form, per_rank, ranks
):
    assert simulation.MAP == (MIB, MIB)  # 16 heads of 128 x 128, fp32
    for tokens in (2**17, 2**24):
        found = bytes_of(simulation.handoff, tokens, ranks, form, per_rank)
        assert found == sum(received(form, ranks, per_rank, MIB, MIB))


def test_the_other_schemes_exchange_the_bytes_that_are_known_of_them(simulation, bytes_of):
    # flash-linear-attention: 14 MiB a direction at 8 ranks and 16 heads.
    assert bytes_of(simulation.flash_linear_attention, 2**17, 8) == 2 * 14 * MIB
    # Megatron: 2,048 bytes a token and head, of which a rank has an eighth and receives seven eighths.
    assert bytes_of(simulation.all_to_all, 2**17, 8) == 2 * 2048 * 2**14 * 16 * 7 / 8
    assert simulation.all_to_all(None, None, 2**17, 32) is None  # 16 heads
    # Keys and values of 16 heads of 128 in bf16, of all tokens but one's own; and of a window.
    for balanced in (False, True):
        assert bytes_of(simulation.softmax, 2**17, 8, balanced) == 2 * (2 * 2 * 128 * 16) * 2**17 * 7 / 8
    assert bytes_of(simulation.window, 2**17, 8) == 2 * (2 * 2 * 128 * 16) * 2048


def test_break_even_is_the_length_from_which_on_a_scheme_wins(simulation):
    assert simulation.break_even(lambda tokens: tokens >= 5000, 8) == pytest.approx(5000, rel=0.021)
    assert simulation.break_even(lambda tokens: tokens < 20 or tokens > 700, 2) == pytest.approx(700, rel=0.021)
    assert simulation.break_even(lambda tokens: True, 4) == 4
    assert simulation.break_even(lambda tokens: tokens < 1e6, 4) is None


def test_the_document_has_the_tables_that_the_measured_costs_give():
    run = subprocess.run([sys.executable, str(SIMULATION)], stdout=subprocess.PIPE, text=True, check=True)
    text = (ROOT / "docs" / "context_parallel.md").read_text()
    tables = run.stdout.strip().split("\n\n")
    assert len(tables) == 9
    for table in tables:
        assert table in text
