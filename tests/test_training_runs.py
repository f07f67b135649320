"""Whole training runs through TorchTitan's own entry point, on CPU."""

import math
import random
import re
import signal
import subprocess
import sys

import pytest

from gdn2_titan.titan.byte_tokenizer import BYTE_TOKENIZER_DIR
from tests.distributed import runs
from tests.generations import only_functions, only_toml
from tests.training import LOSS, ROOT, SHORT, environment, scalars, tags, train


def test_the_loss_falls_from_ln_vocabulary_on_the_standard_librarys_source(tmp_path):
    train(1, tmp_path, *SHORT, "--training.steps=60", "--training.local_batch_size=4", "--gdn2.statistics_freq=20",
          "--validation.enable", "--validation.freq=30", "--validation.steps=2", "--validation.seq_len=64")  # fmt: skip
    loss = scalars(tmp_path, LOSS)
    assert abs(loss[1] - math.log(264)) < 0.2
    assert sum(loss[step] for step in range(51, 61)) / 10 < 3.6
    assert set(scalars(tmp_path, "validation_metrics/loss")) == {1, 30, 60}
    for layer in (0, 2):  # the GDN-2 layers of the hybrid
        for name in ("erase_gate_mean", "erase_gate_std", "write_gate_mean", "write_gate_std", "half_life_mean",
                     "half_life_std", "state_norm"):  # fmt: skip
            curve = scalars(tmp_path, f"gdn2/layers.{layer}/{name}")
            assert set(curve) == {1, 20, 40, 60} and all(map(math.isfinite, curve.values()))
    assert not any("layers.1" in tag for tag in tags(tmp_path))


def test_a_run_killed_at_a_random_step_continues_bit_for_bit(tmp_path):
    steps, interval, blocks = 12, 4, 4
    runs.write_documents(tmp_path / "documents.jsonl")

    def run(folder):
        extra = f"--training.steps={steps}", f"--checkpoint.interval={interval}", "--validation.no-enable"
        return runs.arguments("debug_hybrid", folder, tmp_path / "documents.jsonl", *extra, batch=1)

    [whole] = runs.train(1, tmp_path / "of_whole", run(tmp_path / "whole"))
    fatal = random.randint(interval + 1, steps - 1)
    killed = run(tmp_path / "killed")
    codes = runs.train_until_a_rank_dies(1, tmp_path / "of_killed", killed, 0, (fatal - 1) * blocks + 2)
    assert codes == [-signal.SIGKILL], f"was to be killed at step {fatal}"
    [continued] = runs.train(1, tmp_path / "of_killed", killed)
    resumed = (fatal - 1) // interval * interval
    assert continued.training == whole.training[resumed:], f"killed at step {fatal}, resumed at {resumed}"
    assert continued.tokens == whole.tokens[resumed:]


def test_a_finished_run_continues_when_asked_for_more_steps(tmp_path):
    arguments = [*SHORT, "--checkpoint.enable", "--lr_scheduler.total_steps=8"]
    train(1, tmp_path, *arguments, "--training.steps=4")
    assert "Training starts at step 5" in train(1, tmp_path, *arguments, "--training.steps=8")
    assert set(scalars(tmp_path, LOSS)) == set(range(1, 9))


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("python -m gdn2_titan.titan.train --job.config_file train_configs/debug_hybrid.toml", SHORT),
        pytest.param(
            "-m torchtitan.train --job.config_file train_configs/debug_hybrid.toml", SHORT,
            marks=[only_toml, pytest.mark.slow],
        ),
        pytest.param(
            "-m torchtitan.train --module gdn2_titan.titan --config gdn2_debug_hybrid",
            ["--training.seq_len=64", "--metrics.log_freq=1", "--validator.no-enable"],
            marks=[only_functions, pytest.mark.slow],
        ),
    ],
    ids=["of this package", "of 0.2.2", "of 0.3"],
)  # fmt: skip
def test_a_line_of_the_readme_that_launches_trains(line, changes, tmp_path):
    assert line in (ROOT / "docs" / "torchtitan.md").read_text()
    program, *arguments = line.partition("-m ")[2].split()
    torchrun = ["torch.distributed.run", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    starts = [program] if line.startswith("python") else [*torchrun, "-m", program]
    folder = "--job.dump_folder" if "--job.config_file" in line else "--dump_folder"
    clean = {name: value for name, value in environment().items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    run = subprocess.run(
        [sys.executable, "-m", *starts, *arguments, f"{folder}={tmp_path}", "--training.steps=2", *changes],
        env=clean, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    assert "Training completed" in run.stdout and "gdn2 debug_hybrid" in run.stdout


# As wide and deep as they are, with narrow mixers and MLPs.
NARROW = [
    "--gdn2.mlp_size=32", "--gdn2.num_heads=1", "--gdn2.head_dim=16", "--gdn2.window=16",
    f"--model.hf_assets_path={BYTE_TOKENIZER_DIR}", "--training.dataset=stdlib", "--training.global_batch_size=-1",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["debug_mamba2", "debug_mamba3", "debug_carve", "150M", "1.3B", "paper/370M", "paper/1.3B_hybrid"],
)
def test_a_shipped_config_of_each_kind_that_is_no_task_trains_a_step(name, tmp_path):
    [curves] = runs.train(1, tmp_path / "out", [
        f"--job.config_file={ROOT / 'train_configs' / name}.toml", f"--job.dump_folder={tmp_path}",
        "--training.steps=1", "--training.seq_len=32", "--training.local_batch_size=1", "--metrics.log_freq=1",
        "--metrics.no-enable_tensorboard", "--checkpoint.no-enable", "--validation.no-enable",
        "--compile.backend=aot_eager", "--debug.seed=0", *([] if name.startswith("debug") else NARROW),
    ])  # fmt: skip
    [(loss, norm)] = curves.training
    assert loss < math.log(32_000) + 2 and math.isfinite(norm)  # a few tokens: far from a mean


@pytest.mark.slow
def test_a_file_that_names_no_module_trains_by_this_packages_launcher_and_a_wrong_one_ends_with_status_2(tmp_path):
    named = (ROOT / "train_configs" / "debug.toml").read_text()
    path = tmp_path / "x.toml"
    path.write_text(re.sub(r"custom_config_module = .*\n", "", named))
    for change, status, said in (("2", 0, "step: 1/2 "), ("0", 2, "Config error: training.steps is 0; ")):
        run = subprocess.run(
            [sys.executable, "-m", "gdn2_titan.titan.train", f"--job.config_file={path}", *SHORT,
             f"--job.dump_folder={tmp_path}", f"--training.steps={change}", "--metrics.disable_color_printing"],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        )  # fmt: skip
        assert run.returncode == status and said in run.stdout and "Traceback" not in run.stdout, run.stdout[-4000:]
