"""Functions that run in processes over gloo, what each of them returns, and the bytes of their collectives."""

import collections
import json
import multiprocessing
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Collectives", "run"]

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


class Collectives(TorchDispatchMode):
    """Adds up bytes by what the rules say: {operator: rule(*its arguments) -> (key, bytes)}. Without a rule are those
    that receive or wait for what is counted where it is sent or started; any other is an error."""

    SILENT = ("c10d.recv_", "_c10d_functional.wait_tensor", "_c10d_functional._wrap_tensor_autograd")

    def __init__(self, rules):
        super().__init__()
        self.rules = rules
        self.bytes = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # until it has become operators on this rank's tensors
        name = str(func.overloadpacket)
        if name in self.rules:
            key, n = self.rules[name](*args)
            self.bytes[key] += n
        elif func.namespace in ("c10d", "_c10d_functional") and name not in self.SILENT:
            raise NotImplementedError(f"{name} is not counted")
        return func(*args, **(kwargs or {}))
