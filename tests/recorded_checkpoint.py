"""A checkpoint of each generation of TorchTitan, for the other to continue: written by the one that is installed with

python -m tests.recorded_checkpoint record

beside this file, with the losses and gradient norms of the steps after it.
"""

import dataclasses
import importlib.metadata
import json
import sys
import tarfile
import tempfile
from pathlib import Path

from gdn2_titan.models import flavors
from gdn2_titan.titan.torchtitan_version import IS_V02
from tests.training import GRAD_NORM, LOSS, ROOT, launch, scalars

__all__ = ["AFTER", "CURVES", "archive", "continued", "curves"]

SAVED, STEPS = 6, 12
AFTER = range(SAVED + 1, STEPS + 1)
CURVES = "curves.json"
TINY = {
    "hidden_size": 8, "mlp_size": 8, "num_heads": 1, "head_dim": 8, "attn_heads": 1, "attn_kv_heads": 1, "window": 8,
    "layer_pattern": ("gdn2", "swa"),
}  # fmt: skip


def archive(version):
    """The file with the checkpoint of a TorchTitan's version, and its curves."""
    return Path(__file__).with_name(f"checkpoint_of_{version.replace('.', '_')}.tar.xz")


def continued(folder):
    """Trains in a process of its own, from the checkpoint in a folder if it has one; returns what it printed."""
    code, printed = launch(1, "tests.recorded_checkpoint", folder, "train", str(folder))
    assert code == 0, printed[-4000:]
    return printed


def curves(folder):
    """{"loss": {step: value}, "norm": the same} of the steps after the checkpoint."""
    found = {"loss": scalars(folder, LOSS), "norm": scalars(folder, GRAD_NORM)}
    return {name: {str(step): curve[step] for step in AFTER} for name, curve in found.items()}


def _train(folder):
    flavors["tiny"] = dataclasses.replace(flavors["recall"], **TINY)
    from gdn2_titan.titan.job_config import build, parse

    if IS_V02:  # which has the flavors of when the plug was imported
        from torchtitan.protocols.train_spec import get_train_spec

        from gdn2_titan.titan.v02.components import titan_flavors

        get_train_spec("gdn2").model_args["tiny"] = titan_flavors()["tiny"]

    job_config = parse([
        f"--job.config_file={ROOT / 'train_configs' / 'recall' / 'mqar.toml'}", f"--job.dump_folder={folder}",
        "--model.flavor=tiny", "--training.seq_len=32", "--training.local_batch_size=4", f"--training.steps={STEPS}",
        "--task.pairs", "3", "--task.keys=64", "--task.values=2", "--lr_scheduler.warmup_steps=2",
        "--lr_scheduler.decay_type=cosine", "--optimizer.lr=0.01", "--optimizer.eps=1e-4", "--metrics.log_freq=1",
        "--validation.no-enable", f"--checkpoint.interval={SAVED}", "--checkpoint.keep_latest_k=0",
    ])  # fmt: skip
    from torchtitan.tools.logging import init_logger

    init_logger()
    trainer = build(job_config)
    trainer.train()
    trainer.close()


def _record():
    with tempfile.TemporaryDirectory() as folder:
        continued(folder)
        (Path(folder) / CURVES).write_text(json.dumps(curves(folder), indent=1) + "\n")
        with tarfile.open(archive(importlib.metadata.version("torchtitan")), "w:xz") as file:
            for name in (CURVES, f"checkpoint/step-{SAVED}"):
                file.add(Path(folder) / name, name)


if __name__ == "__main__":
    _train(sys.argv[2]) if sys.argv[1] == "train" else _record()
