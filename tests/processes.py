"""Runs a function in several processes over gloo."""

import datetime
import multiprocessing
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["become_rank", "end_here", "run", "start", "store_of_launch"]

# Processes are forked from one that has imported all this, and has run nothing: a rank costs a fork, not ten seconds of
# imports, and finds nothing of another test. Modules that are not installed are passed over.
multiprocessing.set_forkserver_preload([
    "torch._dynamo.testing", "torch._functorch.aot_autograd", "torch._inductor.compile_fx", "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel", "pytest", "gdn2_titan.parallel", "torchao.float8", "torchtitan.train",
    "gdn2_titan.titan.job_config", "tests.distributed.runs",
])  # fmt: skip


def start(function, world, *arguments):
    """Calls function(rank, *arguments) in `world` new processes; the first that fails ends all, with its traceback."""
    mp.start_processes(function, arguments, nprocs=world, start_method="forkserver")


def store_of_launch():
    """A store, and what tells the ranks of a launch where it is, as torchrun does: its port is one that was free."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    return store, {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"
    }  # fmt: skip


def become_rank(rank, world, address):
    """What torchrun tells a process."""
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
    # A loader's worker ends when its parent is gone: that must be the rank, not the server that forks processes.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)


def run(function, world, store, *arguments):
    """The same, in a process group of gloo; store is a path that does not exist yet."""
    start(_process, world, function, world, str(store), arguments)


def _process(rank, function, world, store, arguments):
    limit = datetime.timedelta(minutes=5)  # a rank that waits for one that never comes says so
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    function(rank, *arguments)
    dist.barrier()  # gloo aborts a process that leaves while the other still talks to it
    dist.destroy_process_group()
    end_here()


def end_here(status=0):
    """A model and its mesh keep the group's threads alive. One that drops the last collective's tensors while Python
    shuts down waits for a GIL it never gets, and Python ends it by a forced unwind that std::terminate turns into
    SIGABRT. So Python does not shut down here."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
