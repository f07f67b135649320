"""Trains the cells of a study in batches, each batch in a process of its own."""

import fcntl
import json
import math
import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor
from torchtitan.tools.logging import init_logger
from tqdm import tqdm

from gdn2_titan.convert.atomic import write_text
from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.titan.job_config import parse, validate
from gdn2_titan.titan.settings import Settings

from .batched import Batch, Member
from .cells import Cell, Experiment, build_model

__all__ = ["CONFIG", "LOG", "RESULT", "batches", "forget_half_compiled", "member", "train_all", "train_batch"]

CONFIG, RESULT, LOG, CHECKPOINT = "config.toml", "result.json", "log.txt", "checkpoint.pt"
COMPILED = "compiled"  # beside the cells' folders
# Models in a batch: what the operators work on then still fits the cache of one core.
LARGEST = 5


def batches(cells: list[Cell], together: Callable[[Experiment], Any]) -> list[list[Cell]]:
    """The cells in batches of one mixer, and of experiments for which ``together`` is the same; first one batch of each
    mixer, then the next of each.

    Sums of a larger batch may be rounded otherwise. So a study that has more cells has the same batches of these.
    """
    alike: dict[tuple, list[Cell]] = {}
    for cell in cells:
        alike.setdefault((cell.mixer, together(cell.experiment)), []).append(cell)
    found = []
    for of in alike.values():
        size = math.ceil(len(of) / math.ceil(len(of) / LARGEST))
        found += [(i, of[i : i + size]) for i in range(0, len(of), size)]
    return [batch for _, batch in sorted(found, key=itemgetter(0))]


def member(cell: Cell, folder: Path) -> Member:
    """The model of a cell and its settings, read from the config that is written to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, cell.toml(folder))
    config = parse([f"--job.config_file={folder / CONFIG}"])
    validate(config)
    return Member(build_model(cell.mixer, cell.model_fields, cell.seed), Settings.of(config))


def train_batch(cells: list[Cell], runs: Path, compile: bool) -> bool:
    """Train the cells in folders of ``runs``, unless their results are there, and write these.

    A killed training continues from its checkpoint. Meant for a process of its own: output goes to the log, which is in
    the folder of the first cell. Returns whether there are results now; if not, the log has the reason.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(runs / COMPILED)
    folders = [runs / cell.name for cell in cells]
    folders[0].mkdir(parents=True, exist_ok=True)
    with open(folders[0] / LOG, "a") as log:
        # A training that outlived its killed study may still be at it.
        fcntl.flock(log, fcntl.LOCK_EX)
        if all((folder / RESULT).exists() for folder in folders):
            return True
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        try:
            _train(cells, folders, compile)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            return False
    return True


def _train(cells: list[Cell], folders: list[Path], compile: bool) -> None:
    # One thread, whatever the machine: sums in another order would be other numbers.
    torch.set_num_threads(1)
    inductor.compile_threads = 1
    init_logger()
    members = [member(cell, folder) for cell, folder in zip(cells, folders, strict=True)]
    if compile:
        # All batches have one size: a step is compiled once for a mixer, and found again by the later batches.
        members += [member(cells[-1], folders[-1]) for _ in range(LARGEST - len(cells))]
    checkpoint = folders[0] / CHECKPOINT
    batch = Batch(members, checkpoint, compile=compile)
    batch.train()
    for i, (folder, results) in enumerate(zip(folders, batch.validate(len(cells)), strict=True)):
        found = {
            "parameters": sum(p.numel() for p in batch.parameters(i).values()),
            "cpu_seconds": round(batch.cpu_seconds() / len(cells), 3),
            "results": results,
        }
        write_text(folder / RESULT, json.dumps(found, indent=1) + "\n")
    checkpoint.unlink(missing_ok=True)


def forget_half_compiled(unfinished: list[list[Cell]], runs: Path) -> None:
    """Removes what was compiled if one of these batches had begun: a compiler that was killed with it leaves a piece of
    a library, which would be taken for the whole."""
    if any((runs / batch[0].name / LOG).exists() for batch in unfinished):
        shutil.rmtree(runs / COMPILED, ignore_errors=True)  # one that outlived its study may write there yet


def train_all(every: list[list[Cell]], runs: Path, jobs: int, compile: bool) -> None:
    """Train every batch with a cell that has no result in its folder of ``runs`` yet, ``jobs`` batches at a time.

    Raises:
        ConvertError: trainings failed; all others have been done.
    """
    # Processes forked from one that has imported everything and done nothing: each starts afresh, at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    failed = []
    todo = [batch for batch in every if not all((runs / cell.name / RESULT).exists() for cell in batch)]
    forget_half_compiled(todo, runs)
    with (
        tqdm(total=len(every), initial=len(every) - len(todo), unit="batch", smoothing=0) as progress,
        ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        running = {pool.submit(train_batch, batch, runs, compile): batch for batch in todo}
        try:
            for done in as_completed(running):
                progress.set_postfix_str(running[done][0].name)
                progress.update()
                if not done.result():
                    failed.append(running[done])
        except BrokenProcessPool as error:
            raise ConvertError("a training was killed from outside; the same command goes on from here") from error
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        reason = f"{runs / failed[0][0].name / LOG} says why the first did"
        raise ConvertError(f"{len(failed)} of {len(every)} batches of trainings failed; {reason}")
