"""Training runs by TorchTitan's trainer in several processes, with every loss and gradient norm in full precision."""

import json
import multiprocessing
import os
import socket
from pathlib import Path
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
    "--metrics.no-enable_tensorboard", "--checkpoint.enable", "--checkpoint.interval=1000", "--compile.backend=aot_eager",
]  # fmt: skip
GLOBAL_BATCH = 4


def arguments(config, folder, *extra):
    """Of one run: a config's name, the folder for its checkpoints, and overrides."""
    return [
        f"--job.config_file={ROOT / 'train_configs' / config}.toml", f"--job.dump_folder={folder}", *SMALL,
        f"--training.local_batch_size={GLOBAL_BATCH}", *extra,
    ]  # fmt: skip


def train(world, folder, *runs):
    """Run after run in the same ``world`` processes; returns for each [(loss, gradient norm), ...] by step."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.start_processes(_process, (world, port, str(folder), runs), nprocs=world, start_method="forkserver")
    return [_read(folder, world, i) for i in range(len(runs))]


def _read(folder, world, run):
    ranks = [json.loads((folder / f"{run}-{rank}.json").read_text()) for rank in range(world)]
    with_loss = [curve for curve in ranks if all(loss > 0 for loss, _ in curve)]
    assert with_loss, "no rank has a loss"
    for curve in with_loss[1:]:
        assert curve == with_loss[0], "ranks disagree"
    return with_loss[0]


def _process(rank, world, port, folder, runs):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    from torchtitan.train import Trainer

    from gdn2_titan.titan import job_config  # noqa: F401, settles the device, registers the model
    from gdn2_titan.titan.metrics import GDN2MetricsProcessor

    for i, run in enumerate(runs):
        curve = []

        def log(self, step, loss, max_loss, grad_norm, extra_metrics=None, curve=curve):
            curve.append((loss, grad_norm))

        with mock.patch.object(GDN2MetricsProcessor, "log", log), mock.patch("torchtitan.train.time.sleep"):
            _train_once(Trainer, run)
        (Path(folder) / f"{i}-{rank}.json").write_text(json.dumps(curve))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # as in tests.processes


def _train_once(trainer_class, run):
    from torchtitan.config import ConfigManager

    torch._dynamo.reset()
    trainer = trainer_class(ConfigManager().parse_args(run))
    if trainer.job_config.checkpoint.create_seed_checkpoint:
        trainer.checkpointer.save(curr_step=0, last_step=True)
    else:
        trainer.train()
    trainer.close()
