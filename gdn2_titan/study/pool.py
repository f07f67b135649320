"""Trains the cells of a study side by side, one process each."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from gdn2_titan.convert.errors import ConvertError

from .train_cell import LOG, RESULT, train_cell

__all__ = ["default_jobs", "train_all"]


def default_jobs():
    """As many trainings at a time as there are cores for this process."""
    return len(os.sched_getaffinity(0))


def train_all(folders, jobs):
    """Train every cell that has no result yet, ``jobs`` at a time, showing how far it is.

    folders: {folder: text of its config}.

    Raises:
        ConvertError: trainings failed; all others have been done.
    """
    # Processes forked from one that has imported everything and done nothing: each starts afresh, at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([train_cell.__module__])
    failed = []
    todo = {folder: text for folder, text in folders.items() if not (folder / RESULT).exists()}
    with tqdm(total=len(folders), initial=len(folders) - len(todo), unit="training", smoothing=0) as progress:
        with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
            running = {pool.submit(train_cell, folder, text): folder for folder, text in todo.items()}
            try:
                for done in as_completed(running):
                    folder = running[done]
                    progress.set_postfix_str(folder.name)
                    progress.update()
                    if not done.result():
                        failed.append(folder)
            except BrokenProcessPool as error:
                raise ConvertError("a training was killed from outside; the same command goes on from here") from error
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    if failed:
        raise ConvertError(
            f"{len(failed)} of {len(folders)} trainings failed; {failed[0] / LOG} says why the first did"
        )
