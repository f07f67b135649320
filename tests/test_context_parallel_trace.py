"""What runs between the start of an exchange of maps and the wait for it, read from a profiler's trace."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRACE = Path(__file__).parents[1] / "benchmarks" / "context_parallel_trace.py"
STARTS = {"gather": "_c10d_functional::all_gather_into_tensor_coalesced", "scan": "_c10d_functional::all_to_all_single"}
PROJECTION = {"forward": 1, "backward": 2}  # products: of its input and weight; of the gradient with each


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """{exchange: events, in the order of their starts}."""
    folder = tmp_path_factory.mktemp("traces")
    subprocess.run([sys.executable, "-W", "ignore", str(TRACE), "--out", str(folder)], check=True)
    found = {}
    for exchange in STARTS:
        events = json.loads((folder / f"{exchange}.json").read_text())["traceEvents"]
        found[exchange] = sorted((e for e in events if e.get("ph") == "X"), key=lambda e: e["ts"])
    return found


@pytest.mark.parametrize("exchange", STARTS)
@pytest.mark.parametrize("phase", PROJECTION)
def test_the_projection_runs_after_the_exchange_has_begun_and_before_anything_waits_for_it(traces, exchange, phase):
    (whole,) = (e for e in traces[exchange] if e["name"] == phase)
    end = whole["ts"] + whole["dur"]
    names = [e["name"] for e in traces[exchange] if e["tid"] == whole["tid"] and whole["ts"] <= e["ts"] <= end]
    begun, waited = names.index(STARTS[exchange]), names.index("_c10d_functional::wait_tensor")
    assert names[begun:waited].count("aten::mm") == names.count("aten::mm") == PROJECTION[phase]


@pytest.mark.parametrize("exchange", STARTS)
def test_messages_travel_on_a_thread_of_gloo_once_each_way(traces, exchange):
    (thread,) = {e["tid"] for e in traces[exchange] if e["name"] in PROJECTION}
    messages = [e for e in traces[exchange] if e["name"].startswith("gloo:")]
    assert len(messages) == 2
    assert all(e["tid"] != thread for e in messages)
