"""benchmarks/train_gpu.py from end to end on a CPU; its figures need a GPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--device", "cpu", "--flavor", "debug", "--how", "eager", "--warmup", "1", "--steps", "2"]


def start(*arguments):
    command = [sys.executable, str(BENCHMARKS / "train_gpu.py"), *arguments]
    # Threads that wait for each other crawl where other tests have the cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_on_a_cpu_it_trains_every_shape_and_writes_a_line_and_a_table_of_each(tmp_path):
    run = start("--out", str(tmp_path), *SMALL, "--shape", "64x2", "96x1")
    assert run.returncode == 0, run.stderr
    written = json.loads((tmp_path / "train_gpu.json").read_text())
    printed = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert printed == written["rows"]
    assert [(row["length"], row["batch"]) for row in printed] == [(64, 2), (96, 1)]
    for row in printed:
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["length"] * row["batch"] / row["ms"])
        # 1.1M parameters multiply six times for each token; the mixers add some.
        assert 6e6 < row["flops_per_second"] / row["tokens_per_second"] < 12e6
        assert abs(row["loss"] - math.log(264)) < 0.3  # three small steps from ln(vocabulary)
    assert written["device"]["torch"] == torch.__version__
    table = (tmp_path / "train_gpu.md").read_text()
    assert "| debug | 64 x 2 |" in table and "| debug | 96 x 1 |" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_without_a_gpu_it_refuses_with_one_sentence(tmp_path):
    run = start("--out", str(tmp_path))
    assert run.returncode == 1
    assert run.stderr.strip().splitlines() == ["--device is 'cuda'; without a GPU it must be 'cpu'"]


@pytest.mark.slow
def test_a_case_without_memory_is_a_line_and_the_others_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import train_gpu

    train = train_gpu.train

    def short_of_memory(flavor, length, *rest):
        if length == 64:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return train(flavor, length, *rest)

    monkeypatch.setattr(train_gpu, "train", short_of_memory)
    monkeypatch.setattr(sys, "argv", ["train_gpu.py", "--out", str(tmp_path), *SMALL, "--shape", "64x2", "96x1"])
    with pytest.raises(SystemExit) as ended:
        train_gpu.main()
    assert not ended.value.code
    first, second = json.loads((tmp_path / "train_gpu.json").read_text())["rows"]
    assert first["error"] == "out of memory" and "ms" in second
    assert "| debug | 64 x 2 | out of memory |" in (tmp_path / "train_gpu.md").read_text()
