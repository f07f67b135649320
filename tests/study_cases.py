"""A study of recall so small that its trainings take seconds. ``python -m tests.study_cases OUT JOBS`` runs it in a
process that can be killed."""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from gdn2_titan.study.cells import Experiment, Plan
from gdn2_titan.study.recall import study

__all__ = ["PART", "PLAN", "TINY", "TRACK", "alone"]

TINY = Experiment(
    "version", ("softmax + conv",),
    {"pairs": [1, 2], "keys": 16, "values": 16, "validation_pairs": [1, 2], "validation_lengths": [24]},
    steps=2, seq_len=24, batch=4, chosen_on=("version",), validated=32,
)  # fmt: skip
TRACK = Experiment(
    "parity", ("GDN-2, erase up to 2",), {"validation_lengths": [16]},
    steps=2, seq_len=16, batch=4, chosen_on=("parity",), validated=32,
)  # fmt: skip
PART = Plan((TINY,), sweep_seeds=1, seeds=2, compile=False)
PLAN = dataclasses.replace(PART, experiments=(TINY, TRACK))


def alone(rank, cells, folders):
    """Trains each cell by TorchTitan, in the process of its own that this is, and leaves parameters and results."""
    from gdn2_titan.titan.job_config import build, parse

    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for cell, folder in zip(cells, folders, strict=True):
        (folder / "config.toml").write_text(cell.toml(folder))
        trainer = build(parse([f"--job.config_file={folder / 'config.toml'}", "--checkpoint.no-enable"]))
        trainer.train()
        named = trainer.model_parts[0].named_parameters()
        # TorchTitan 0.3 shards over one process as well.
        parameters = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in named}
        torch.save({name: p.detach() for name, p in parameters.items()}, folder / "parameters.pt")
        (folder / "results.json").write_text(json.dumps(trainer.validator.results))
        trainer.close()
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    study(Path(sys.argv[1]), PLAN, int(sys.argv[2]))
