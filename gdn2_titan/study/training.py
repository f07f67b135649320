"""Trains the cells of a study through TorchTitan, side by side, in one process each."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from torchtitan.tools.logging import init_logger
from tqdm import tqdm

from gdn2_titan.convert.atomic import write_text
from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.titan.job_config import build, parse

__all__ = ["CONFIG", "LOG", "RESULT", "train_all", "train_cell"]

CONFIG, RESULT, LOG = "config.toml", "result.json", "log.txt"


def train_cell(folder: Path, toml: str) -> bool:
    """Train the config ``toml`` in ``folder`` unless its result is there, and write the result.

    A killed training continues from its checkpoint. Meant for a process of its own: output goes to the log. Returns
    whether there is a result now; if not, the log has the reason.
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
            result = _train(folder / CONFIG)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            return False
        write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return True


def _train(config_file: Path) -> dict[str, Any]:
    """Number of parameters, and results of the validator, of a training to its end."""
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
        return {"parameters": count, "results": trainer.validator.results}
    finally:
        trainer.close()
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()


def train_all(folders: dict[Path, str], jobs: int) -> None:
    """Train every cell of {folder: text of its config} that has no result yet, ``jobs`` at a time.

    Raises:
        ConvertError: trainings failed; all others have been done.
    """
    # Processes forked from one that has imported everything and done nothing: each starts afresh, at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    failed = []
    todo = {folder: text for folder, text in folders.items() if not (folder / RESULT).exists()}
    with (
        tqdm(total=len(folders), initial=len(folders) - len(todo), unit="training", smoothing=0) as progress,
        ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        running = {pool.submit(train_cell, folder, text): folder for folder, text in todo.items()}
        try:
            for done in as_completed(running):
                progress.set_postfix_str(running[done].name)
                progress.update()
                if not done.result():
                    failed.append(running[done])
        except BrokenProcessPool as error:
            raise ConvertError("a training was killed from outside; the same command goes on from here") from error
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        reason = f"{failed[0] / LOG} says why the first did"
        raise ConvertError(f"{len(failed)} of {len(folders)} trainings failed; {reason}")
