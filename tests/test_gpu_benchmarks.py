"""What runs on a lent GPU, as far as it can be seen without one: stages, the check of kernels, compiling beforehand."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.concerns import concerns_titan

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """A module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run_stages(folder, *stages):
    """run_gpu.sh with a Python that notes what it is asked for, and breaks where that is check_gpu.py."""
    python = folder / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\ncase "$*" in *check_gpu*) exit 3;; esac\n')
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    command = [BENCHMARKS / "run_gpu.sh", folder / "results", *stages]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_stage_that_fails_does_not_keep_the_next_from_running_and_the_exit_status_says_so(tmp_path):
    assert run_stages(tmp_path).returncode == 1
    lines = (tmp_path / "results" / "stages.txt").read_text().splitlines()
    assert [line[0] for line in lines] == ["a", "b", "c", "d"]
    assert ["exit status 3" in line for line in lines] == [True, False, False, False]
    limits = [int(line.split(" s of ")[1].split(",")[0]) for line in lines]
    assert sum(limits) <= 15 * 60 - 60 and max(limits) <= 10 * 60


def test_the_stage_of_tests_takes_every_file_that_is_for_a_gpu_and_none_that_wants_torchtitan(tmp_path):
    assert run_stages(tmp_path, "c").returncode == 0
    asked = {ROOT / word for word in (tmp_path / "asked").read_text().split() if word.endswith(".py")}
    marks = re.compile(r"^pytestmark = .*pytest\.mark\.gpu", re.MULTILINE)
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if marks.search(path.read_text())}
    assert len(marked) > 5 and marked <= asked and not any(map(concerns_titan, asked))


def test_stages_can_be_chosen_and_unknown_ones_are_refused(tmp_path):
    assert run_stages(tmp_path, "d", "b").returncode == 0
    asked = [line.split()[0] for line in (tmp_path / "asked").read_text().splitlines()]
    assert asked == ["benchmarks/train_gpu.py", "benchmarks/op_gpu.py"]
    refused = run_stages(tmp_path, "a", "e")
    assert refused.returncode == 2 and "the stage is 'e'; it must be one of a, b, c, d" in refused.stderr


def test_the_prediction_beside_a_time_is_that_of_the_page_on_kernels(benchmark):
    op_gpu = benchmark("op_gpu")
    page = (BENCHMARKS.parent / "docs" / "kernels.md").read_text()
    for B, T in op_gpu.SHAPES:
        found = op_gpu.predicted(B, T)
        # Of the third shape nobody has modelled the other's kernels.
        assert set(found) == {op_gpu.OURS, *([op_gpu.FLA] if (B, T) != (4, 8192) else [])}
        assert all(text in page for text in found.values())
    assert op_gpu.predicted(3, 77) == {}


def test_a_wrong_result_and_a_kernel_that_nobody_starts_are_found(benchmark, monkeypatch):
    check_gpu = benchmark("check_gpu")
    if torch.cuda.is_available():
        pytest.skip("the whole check is a stage of run_gpu.sh")
    state = torch.randn(2, 3, 3)
    right = check_gpu.Call("right", lambda x, backend: x + 1, {"x": state})
    wrong = check_gpu.Call("wrong", lambda x, backend: x + (0.999 if backend == "triton" else 1), {"x": state})
    broken = check_gpu.Call("broken", lambda x, backend: 1 / 0, {"x": state})
    monkeypatch.setattr(check_gpu, "calls", lambda device, tokens: [right, wrong, broken])
    rows = {row["call"]: row["ok"] for row in check_gpu.check("cpu", None)}
    kernels = check_gpu.kernels()
    assert {"recurrent_kernel", "scan_kernel", "causal_conv1d_update_kernel"} <= kernels
    assert rows == {"right": True, "wrong": False, "broken": False} | dict.fromkeys(kernels, False)


@pytest.mark.slow
def test_the_check_starts_every_kernel_and_finds_them_right(benchmark, monkeypatch):
    check_gpu = benchmark("check_gpu")
    shapes = {
        name: (kind, B, T // 100, 16, 16, options) for name, (kind, B, T, _, _, options) in check_gpu.SHAPES.items()
    }
    monkeypatch.setattr(check_gpu, "SHAPES", shapes)
    monkeypatch.setattr(check_gpu, "H", 1)
    wrong = [row for row in check_gpu.check("cuda" if torch.cuda.is_available() else "cpu", None) if not row["ok"]]
    assert not wrong


# Only the convolutions, which compile in seconds.
COMPILED = """
import os, pathlib, sys
sys.path.insert(0, sys.argv[1])
os.environ["TRITON_CACHE_DIR"] = sys.argv[2]
import precompile
precompile.settle(pathlib.Path(sys.argv[2]))
calls = precompile._calls
precompile._calls = lambda stage: [call for call in calls(stage) if call[0] == "causal_conv1d_qkv"]
print([(kernel, end) for _, kernel, end in precompile.run_stage(("b", "sm_90", sys.argv[2], 0, 1))])
"""


@pytest.mark.slow
def test_what_was_compiled_beforehand_is_found_by_the_launch_of_another_process_and_place(tmp_path):
    kernels = [f"causal_conv1d_{name}_kernel" for name in ("forward", "backward", "sum")]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}

    def found(folder):
        command = [sys.executable, "-c", COMPILED, BENCHMARKS, folder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    (tmp_path / "cache").mkdir()
    assert found(tmp_path / "cache") == str([(name, "compiled") for name in kernels])
    moved = (tmp_path / "cache").rename(tmp_path / "moved")
    assert found(moved) == str([(name, "there") for name in kernels])


SETTLED = """
import sys
sys.path.insert(0, sys.argv[1])
from keys import settle_keys
from triton.runtime.jit import JITCallable
from gdn2_titan.ops.gdn2.triton import gradient, recurrent, scan
settle_keys()
found = {name: x.hash for module in (gradient, recurrent, scan) for name, x in vars(module).items()
         if isinstance(x, JITCallable)}
print(len(found) > 20, [name for name, key in found.items() if key is None])
"""


def test_the_key_of_every_function_is_made_before_the_first_launch():
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SETTLED, BENCHMARKS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split("\n")[-2] == "True []", done.stderr
