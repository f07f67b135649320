"""Trains one cell of a study through TorchTitan, in the process that it is called in."""

import contextlib
import fcntl
import json
import os
import sys
import traceback

import torch
from torchtitan.tools.logging import init_logger

from gdn2_titan.convert.atomic import write_text
from gdn2_titan.titan.job_config import build, parse

__all__ = ["RESULT", "train_cell"]

CONFIG, RESULT, LOG = "config.toml", "result.json", "log.txt"


def train_cell(folder, toml):
    """Train the config ``toml`` in ``folder`` (a pathlib.Path) unless its result is there, and write the result.

    A killed training continues from its checkpoint. Meant for a process of its own: output goes to the log.

    Returns:
        Whether there is a result now; if not, the log has the reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG, "a") as log:
        # A training that outlived its killed study may still be at it.
        fcntl.flock(log, fcntl.LOCK_EX)
        if (folder / RESULT).exists():
            return True
        write_text(folder / CONFIG, toml)
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        try:
            results, count = _train(folder / CONFIG)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            return False
        write_text(folder / RESULT, json.dumps({"parameters": count, "results": results}, indent=1) + "\n")
    return True


def _train(config_file):
    """(results of the validator, number of parameters) of a training to its end."""
    # One thread, whatever the machine: sums in another order would be other numbers.
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    init_logger()
    trainer = build(parse([f"--job.config_file={config_file}"]))
    try:
        trainer.train()
        if not trainer.validator.results:  # killed between the last step's checkpoint and its validation
            trainer.validator.validate(trainer.model_parts, trainer.step)
        count = sum(p.numel() for part in trainer.model_parts for p in part.parameters())
        return trainer.validator.results, count
    finally:
        trainer.close()
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()
