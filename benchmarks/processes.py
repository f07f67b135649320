"""Functions that run in processes over gloo, and what each of them returns."""

import json
import multiprocessing
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["run"]

# The processes are forked from one that has imported what takes long.
multiprocessing.set_forkserver_preload(["gdn2_titan.parallel", "torch.distributed.pipelining"])


def run(function, world, *arguments):
    """[function(*arguments) of each rank], as JSON gives it back."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (function, world, folder, *arguments), nprocs=world, start_method="forkserver")
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(world)]


def _process(rank, function, world, folder, *arguments):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (Path(folder) / str(rank)).write_text(json.dumps(function(*arguments)))
    dist.barrier()
    os._exit(0)  # gloo's threads can abort a Python that shuts down
