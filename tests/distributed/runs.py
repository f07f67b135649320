"""Training runs by TorchTitan's trainer in several processes, with every loss and gradient norm in full precision."""

import importlib
import itertools
import json
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from gdn2_titan.models.decoder import SwiGLU
from gdn2_titan.titan.pipeline import RUNS
from gdn2_titan.titan.torchtitan_version import IS_V02
from tests.processes import become_rank, end_here, start, store_of_launch
from tests.training import GRAD_NORM, LOSS, ROOT, SHORT

# Four heads of everything, so that four ranks can share them; decays slow enough that states cross chunks.
SMALL = [
    *SHORT, "--training.seq_len=128", "--training.steps=10", "--gdn2.num_heads=4", "--gdn2.head_dim=16",
    "--gdn2.attn_kv_heads=4", "--gdn2.window=48", "--gdn2.statistics_freq=5", "--optimizer.eps=1e-4",
    "--metrics.no-enable_tensorboard", "--checkpoint.enable", "--checkpoint.interval=1000",
    "--compile.backend=aot_eager", "--validation.enable", "--validation.freq=10", "--validation.steps=2",
    "--validation.seq_len=128", "--training.dataset=files", "--validation.dataset=files",
]  # fmt: skip
GLOBAL_BATCH = 4
# Four layers: every kind of mixer, in stages of a pipeline that differ.
PATTERNS = {"debug": (), "debug_hybrid": ("--gdn2.layer_pattern=gdn2,swa,attention,gdn2",)}


def arguments(config, folder, documents, *extra, batch=GLOBAL_BATCH):
    """Of one run of a config, with a file of documents and the batch of one data-parallel rank."""
    return [
        f"--job.config_file={ROOT / 'train_configs' / config}.toml", f"--job.dump_folder={folder}", *SMALL,
        f"--training.local_batch_size={batch}", f"--training.dataset_path={documents}",
        f"--validation.local_batch_size={batch}", f"--validation.dataset_path={documents}", *PATTERNS[config], *extra,
    ]  # fmt: skip


# A field of 0.3's config that TOML files have not.
OLDER_BACKEND = "--parallelism.spmd_backend=partial_dtensor"
# The same rates in runs of three and of ten steps.
STEPS = ("--lr_scheduler.total_steps=10", "--validation.freq=3", "--gdn2.statistics_freq=3")
SHORT_RUN, WHOLE_RUN = "--training.steps=3", "--training.steps=10"


def run_from(seed, folder, data_parallel, *extra, batch=None):
    """Arguments of a run from the seed checkpoint, of a batch for one of so many data-parallel ranks."""
    return arguments(
        "debug_hybrid", folder / "run", seed / "documents.jsonl",
        f"--checkpoint.initial_load_path={seed / 'checkpoint' / 'step-0'}",
        "--checkpoint.no-initial_load_model_only", *STEPS, *extra, batch=batch or GLOBAL_BATCH // data_parallel,
    )  # fmt: skip


def assert_same(found, expected, first_step=1, last_step=10):
    """Of the steps from the first to the last. Both runs validate at 1, 3, 6 and 9."""
    steps = range(first_step, last_step + 1)
    for step, now, then in zip(steps, found.training, expected.training[first_step - 1 : last_step], strict=True):
        for name, a, b in zip(("loss", "gradient norm"), now, then, strict=True):
            assert a == pytest.approx(b, rel=1e-5), f"{name} of step {step}"
    validated = zip((1, 3, 6, 9), expected.validation, strict=True)
    assert found.validation == pytest.approx([x for step, x in validated if first_step <= step <= last_step], rel=1e-5)
    assert set(found.statistics) == set(expected.statistics)
    for (mean, _), worst in zip(found.training, found.worst, strict=True):
        assert worst >= mean * (1 - 1e-6)  # the greatest of what the mean is of


only_backends = pytest.mark.skipif(IS_V02, reason="TorchTitan 0.2.2 has no choice of backends")
without_pipelines = pytest.mark.skipif(not RUNS, reason="TorchTitan 0.3 refuses pipelines on a torch before 2.14")


def layouts(names, quick):
    """Names of layouts as parameters of a test: slow but for those that are quick; those with pipelines, or with the
    older backend, are skipped where none runs."""
    marks = {
        name: [without_pipelines] * ("pp" in name)
        + [only_backends] * ("partial_dtensor" in name)
        + [pytest.mark.slow] * (name not in quick)
        for name in names
    }
    return [pytest.param(name, marks=marks[name]) for name in names]


def write_documents(path):
    """JSON lines of short documents: several to a sequence, so that a reset that got lost would show."""
    draw = random.Random(0)
    with open(path, "w") as file:
        for _ in range(2000):
            words = ["".join(draw.choices("etaoinsh", k=draw.randint(1, 6))) for _ in range(draw.randint(3, 25))]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")


class Curves(NamedTuple):
    training: list  # [loss, gradient norm] of each step
    worst: list  # the greatest loss of a rank, of each step
    tokens: list  # seen until each step
    validation: list  # losses
    statistics: list  # names of the gates' statistics that were logged
    recall: list  # of validations: accuracy, exact and loss by condition


def train(world, folder, *runs):
    """Run after run in the same ``world`` processes; returns the Curves of each."""
    folder.mkdir(parents=True, exist_ok=True)
    store, address = store_of_launch()
    start(_process, world, world, address, str(folder), runs)
    del store
    return [_read(folder, world, i) for i in range(len(runs))]


def train_until_a_rank_dies(world, folder, run, victim, block):
    """A run whose rank ``victim`` kills itself in the ``block``-th forward of a block; nobody ends the other ranks.

    Returns all exit codes; None of a rank that still runs two minutes after the victim's death, and is then killed."""
    context = multiprocessing.get_context("forkserver")
    store, address = store_of_launch()
    common = world, address, str(folder), (run,)
    ranks = [
        context.Process(target=_process, args=(rank, *common, block if rank == victim else None))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    ranks[victim].join()
    codes = []
    for process in ranks:
        process.join(120)
        codes.append(process.exitcode)
        process.kill()
    del store
    return codes


def _read(folder, world, run):
    ranks = [Curves(*json.loads((folder / f"{run}-{rank}.json").read_text())) for rank in range(world)]
    with_loss = [curves for curves in ranks if all(loss > 0 for loss, _ in curves.training)]
    assert with_loss, "no rank has a loss"
    for curves in with_loss[1:]:
        assert curves == with_loss[0], "ranks disagree"
    return with_loss[0]


def _process(rank, world, address, folder, runs, fatal_block=None):
    become_rank(rank, world, address)
    if fatal_block is not None:
        _die_in(fatal_block)
    for i, run in enumerate(runs):
        curves = _train_once(run)
        (Path(folder) / f"{i}-{rank}.json").write_text(json.dumps(curves))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    end_here()


def _die_in(fatal_block):
    forward, count = SwiGLU.forward, itertools.count(1)

    def mortal(self, x):
        if next(count) == fatal_block:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, x)

    SwiGLU.forward = mortal


def _older(job_config):
    from gdn2_titan.titan.v03.config import trainer_config

    config = trainer_config(job_config)
    config.parallelism.spmd_backend = "partial_dtensor"
    return config.build()


def _train_once(run):
    from torchtitan.components.metrics import BaseLogger

    from gdn2_titan.titan.job_config import build, parse  # settles the device; under 0.2.2 registers the model

    generation = importlib.import_module(f"gdn2_titan.titan.{'v02' if IS_V02 else 'v03'}.components")
    curves = Curves([], [], [], [], [], [])

    class Recorder(BaseLogger):
        def log(self, metrics, step):
            if GRAD_NORM in metrics:
                curves.training.append((metrics[LOSS], metrics[GRAD_NORM]))
                curves.worst.append(metrics["loss_metrics/global_max_loss"])
                curves.tokens.append(metrics["n_tokens_seen"])
            elif "validation_metrics/loss" in metrics:
                curves.validation.append(metrics["validation_metrics/loss"])
                curves.recall.append({name: value for name, value in metrics.items() if "length=" in name})
            else:
                curves.statistics.extend(metrics)

    processor, begin = generation.GDN2MetricsProcessor, generation.GDN2MetricsProcessor.__init__

    def recording(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.logger = Recorder()

    torch._dynamo.reset()
    with mock.patch.object(processor, "__init__", recording), mock.patch("time.sleep"):
        job_config = parse([word for word in run if word != OLDER_BACKEND])
        trainer = _older(job_config) if OLDER_BACKEND in run else build(job_config)
        try:
            if job_config.checkpoint.create_seed_checkpoint:
                trainer.checkpointer.save(curr_step=0, last_step=True)
            else:
                trainer.train()
        finally:
            trainer.close()
    return curves
