"""The examples run, and docs/forks.md quotes them. Run it in an environment of each generation of TorchTitan."""

import inspect
import json
import math
import random
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from tests.training import GRAD_NORM, HAS_TOML, LOSS, ROOT, environment, launcher, scalars

PAGE = (ROOT / "docs" / "forks.md").read_text()

only_toml = pytest.mark.skipif(not HAS_TOML, reason="about TorchTitan 0.2.2")
only_functions = pytest.mark.skipif(HAS_TOML, reason="about TorchTitan 0.3")

# What a command says, in the words of the generation that is installed.
if HAS_TOML:
    LLAMA3 = ["--job.config_file=examples/llama3_gdn2/debug.toml"]
    FOLDER, NO_VALIDATION = "--job.dump_folder", []
    SAME = ["--optimizer.eps=1e-4", "--training.dataset=files", "--training.dataset_path"]
    COMPILED = ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"]
else:
    LLAMA3 = ["--module=examples.llama3_gdn2", "--config=llama3_gdn2_debug"]
    FOLDER, NO_VALIDATION = "--dump_folder", ["--validator.no-enable"]
    SAME = ["--dataloader.dataset_path"]
    COMPILED = []  # and selective activation checkpointing, which this config has
SHORT = ["--training.seq_len=64", "--metrics.log_freq=1", "--metrics.enable_tensorboard", *NO_VALIDATION]
LAYOUTS = {
    "FSDP2=2": (2, ["--training.local_batch_size=2"]),
    "TP=2": (2, ["--training.local_batch_size=4", "--parallelism.tensor_parallel_degree=2"]),
    "compiled, checkpointed by op": (
        1,
        ["--training.local_batch_size=4", "--compile.enable", "--compile.backend=aot_eager", *COMPILED],
    ),
}


def launch(processes, folder, *arguments):
    """As the page says it; returns {step: loss} and {step: gradient norm}."""
    run = subprocess.run(
        [*launcher(processes), "torchtitan.train", f"{FOLDER}={folder}", *SHORT, *arguments],
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    return scalars(folder, LOSS), scalars(folder, GRAD_NORM)


def _write_documents(path, order):
    """Windows of 64 tokens, two documents in each, so that a split of the documents is a split of the windows."""
    with open(path, "w") as file:
        for window in order:
            draw = random.Random(window)
            first = draw.randint(10, 52)
            for length in (first, 62 - first):  # bos and the text are inputs
                file.write(json.dumps({"text": "".join(draw.choices("etaoinsh ", k=length))}) + "\n")


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """The losses and gradient norms of one process, and how to begin where it began."""
    folder = tmp_path_factory.mktemp("llama3")
    seed = ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"]
    launch(1, folder / "seed", *LLAMA3, *seed)
    windows = range(64)
    # TorchTitan 0.3's loader gives each rank an unbroken part of the documents.
    halves = [w for i in range(0, 32, 2) for w in (i, i + 1, i + 32, i + 33)]
    _write_documents(folder / "split.jsonl", windows)
    _write_documents(folder / "whole.jsonl", windows if HAS_TOML else halves)

    def train(processes, name, *arguments):
        documents = folder / ("whole.jsonl" if processes == 1 or "TP" in name else "split.jsonl")
        start = ["--checkpoint.enable", f"--checkpoint.initial_load_path={folder / 'seed' / 'checkpoint' / 'step-0'}"]
        data = [*SAME[:-1], f"{SAME[-1]}={documents}"]
        return launch(processes, folder / name, *LLAMA3, "--training.steps=8", *start, *data, *arguments)

    return train, train(1, "one", "--training.local_batch_size=4")


def test_llama3_with_gdn2_in_every_second_layer_learns(llama3):
    losses = list(llama3[1][0].values())
    assert len(losses) == 8 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_llama3_with_gdn2_has_the_losses_of_one_process(llama3, layout):
    train, (losses, norms) = llama3
    processes, arguments = LAYOUTS[layout]
    found_losses, found_norms = train(processes, layout.replace(" ", ""), *arguments)
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert found_norms == pytest.approx(norms, rel=1e-4)
