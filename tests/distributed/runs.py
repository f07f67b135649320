"""Training runs by TorchTitan's trainer in several processes, with every loss and gradient norm in full precision."""

import json
import multiprocessing
import os
import random
import socket
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.multiprocessing as mp

from tests.training import ROOT, SHORT

# The processes are forked from one that has imported all this: eight times less work than importing it in each.
multiprocessing.set_forkserver_preload(["torchtitan.train", "gdn2_titan.titan.job_config", "tests.distributed.runs"])

# Four heads of everything, so that four ranks can share them; decays slow enough that states cross chunks.
SMALL = [
    *SHORT, "--training.seq_len=128", "--training.steps=10", "--gdn2.num_heads=4", "--gdn2.head_dim=16",
    "--gdn2.attn_kv_heads=4", "--gdn2.window=48", "--gdn2.statistics_freq=5", "--optimizer.eps=1e-4",
    "--metrics.no-enable_tensorboard", "--checkpoint.enable", "--checkpoint.interval=1000",
    "--compile.backend=aot_eager", "--validation.enable", "--validation.freq=10", "--validation.steps=2",
    "--validation.seq_len=128", "--training.dataset=files", "--validation.dataset=files",
]  # fmt: skip
GLOBAL_BATCH = 4


def arguments(config, folder, documents, *extra, batch=GLOBAL_BATCH):
    """Of one run of a config, with a file of documents and the batch of one data-parallel rank."""
    return [
        f"--job.config_file={ROOT / 'train_configs' / config}.toml", f"--job.dump_folder={folder}", *SMALL,
        f"--training.local_batch_size={batch}", f"--training.dataset_path={documents}",
        f"--validation.local_batch_size={batch}", f"--validation.dataset_path={documents}", *extra,
    ]  # fmt: skip


def write_documents(path):
    """JSON lines of short documents: several to a sequence, so that a reset that got lost would show."""
    draw = random.Random(0)
    with open(path, "w") as file:
        for _ in range(2000):
            words = ["".join(draw.choices("etaoinsh", k=draw.randint(1, 6))) for _ in range(draw.randint(3, 25))]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")


class Curves(NamedTuple):
    training: list  # [loss, gradient norm] of each step
    validation: list  # losses
    statistics: list  # names of the gates' statistics that were logged


def train(world, folder, *runs):
    """Run after run in the same ``world`` processes; returns the Curves of each."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.start_processes(_process, (world, port, str(folder), runs), nprocs=world, start_method="forkserver")
    return [_read(folder, world, i) for i in range(len(runs))]


def _read(folder, world, run):
    ranks = [Curves(*json.loads((folder / f"{run}-{rank}.json").read_text())) for rank in range(world)]
    with_loss = [curves for curves in ranks if all(loss > 0 for loss, _ in curves.training)]
    assert with_loss, "no rank has a loss"
    for curves in with_loss[1:]:
        assert curves == with_loss[0], "ranks disagree"
    return with_loss[0]


def _process(rank, world, port, folder, runs):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    for i, run in enumerate(runs):
        curves = _train_once(run)
        (Path(folder) / f"{i}-{rank}.json").write_text(json.dumps(curves))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # as in tests.processes


def _train_once(run):
    from torchtitan.config import ConfigManager
    from torchtitan.train import Trainer

    from gdn2_titan.titan import job_config  # noqa: F401, settles the device, registers the model
    from gdn2_titan.titan.metrics import GDN2MetricsProcessor

    curves = Curves([], [], [])

    class Recording(GDN2MetricsProcessor):
        def log(self, step, loss, max_loss, grad_norm, extra_metrics=None):
            curves.training.append((loss, grad_norm))

        def log_validation(self, loss, step, extra_metrics=None):
            curves.validation.append(loss)

        def _statistics(self):
            found = super()._statistics()
            curves.statistics.extend(found)
            return found

    torch._dynamo.reset()
    with (
        mock.patch("gdn2_titan.titan.metrics.GDN2MetricsProcessor", Recording),
        mock.patch("torchtitan.train.time.sleep"),
    ):
        trainer = Trainer(ConfigManager().parse_args(run))
        if trainer.job_config.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(curr_step=0, last_step=True)
        else:
            trainer.train()
        trainer.close()
    return curves
