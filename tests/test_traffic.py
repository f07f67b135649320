"""What the Triton kernels move, counted by benchmarks/traffic.py in Triton's interpreter, against what is promised."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRAFFIC = Path(__file__).parents[1] / "benchmarks" / "traffic.py"
KINDS = ("bf16", "bf16 raw")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def counted():
    command = [sys.executable, str(TRAFFIC), "--json", "--kind", *KINDS]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def moved(phase):
    return phase["total"]["loaded"] + phase["total"]["stored"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_moves_at_most_4600_bytes_per_token_and_head_in_at_most_3_launches(counted, kind):
    assert moved(counted[kind]["forward"]) <= 4600
    assert counted[kind]["forward"]["total"]["launches"] <= 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_moves_at_most_13000_bytes_per_token_and_head_in_at_most_6_launches(counted, kind):
    assert moved(counted[kind]["backward"]) <= 13000
    assert counted[kind]["backward"]["total"]["launches"] <= 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_of_unknown_state_moves_at_most_5600_bytes_per_token_and_head_in_2_launches(counted, kind):
    assert moved(counted[kind]["segment"]) <= 5600
    assert counted[kind]["segment"]["total"]["launches"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_for_backward_is_the_inputs_and_two_squares(counted, kind):
    # q, k, v, b, w in bf16 and g in fp32, or all six in bf16, of 128 channels; A and A_qk [64, 64] of every 64 tokens.
    assert counted[kind]["saved"] == {"bf16": 5 * 256 + 512, "bf16 raw": 6 * 256}[kind] + 256


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase, share", [("forward", 0.76), ("backward", 0.81), ("segment", 0.68)])
def test_without_an_erase_gate_no_more_than_a_share_is_moved_in_as_many_launches(counted, kind, phase, share):
    found, gated = counted[f"{kind}, no erase"][phase], counted[kind][phase]
    assert moved(found) <= share * moved(gated)
    assert found["total"]["launches"] == gated["total"]["launches"]


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_erased_one_square_is_saved_and_no_gate(counted, kind):
    assert counted[f"{kind}, no erase"]["saved"] == counted[kind]["saved"] - 256 - 128


@pytest.mark.parametrize("kind", [*KINDS, *(f"{kind}, no erase" for kind in KINDS)])
@pytest.mark.parametrize("phase", ["forward", "backward", "segment"])
def test_the_counter_sees_every_input_read_and_every_output_written(counted, kind, phase):
    """No launch can load less than the floor's inputs: a count below it would be the counter's fault."""
    found = counted[kind][phase]
    total = found["total"]
    assert found["floor"] <= total["distinct"] <= moved(found) <= total["issued"]
