"""Training by TorchTitan from its entry point, in processes of its own."""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import sys
import time
import traceback
import warnings
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchtitan.config import ConfigManager

from gdn2_titan.titan.torchtitan_version import IS_V02
from tests.processes import become_rank, end_here, store_of_launch

ROOT = Path(__file__).resolve().parents[1]
DEBUG_HYBRID = ROOT / "train_configs" / "debug_hybrid.toml"

# A run that takes seconds: every step logged, small batches of short sequences.
SHORT = [
    "--training.seq_len=64", "--training.local_batch_size=2", "--metrics.log_freq=1", "--validation.no-enable",
    "--checkpoint.no-enable", "--lr_scheduler.warmup_steps=2",
]  # fmt: skip


def environment():
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | single | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def launch(processes, module, folder, *arguments, cwd=None):
    """``python -m module arguments`` in so many ranks, forked from a process that has imported TorchTitan.

    Returns (exit code, what rank 0 printed). Prints go to a file in a folder.
    """
    store, address = store_of_launch()
    ranks = [
        multiprocessing.get_context("forkserver").Process(
            target=_main, args=(rank, processes, address, module, arguments, str(folder), str(cwd or folder))
        )
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    sentinels = {rank.sentinel: rank for rank in ranks}
    while sentinels:  # the first that fails ends the others
        for ended in multiprocessing.connection.wait(sentinels):
            if sentinels.pop(ended).exitcode:
                for rank in ranks:
                    rank.kill()
    del store
    for rank in ranks:
        rank.join()
    printed = [(Path(folder) / f"printed-{rank}.txt").read_text() for rank in range(processes)]
    code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    return code, printed[0] if not code else "\n".join(printed)


def _main(rank, world, address, module, arguments, folder, cwd):
    become_rank(rank, world, address)
    printed = os.open(f"{folder}/printed-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.chdir(cwd)
    sys.argv = [module, *arguments]
    if IS_V02:
        ConfigManager.parse_args.__defaults__ = (list(arguments),)  # which were sys.argv's when it was imported
    sys.modules.pop("gdn2_titan.titan.job_config", None)  # what imports it checks what the command line says
    warnings.simplefilter("ignore")
    time.sleep = lambda seconds: None  # rank 0 gives the others two seconds
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as exit:
        if exit.code:
            print(exit.code, file=sys.stderr)
            end_here(1)
    except BaseException:
        traceback.print_exc()
        end_here(1)
    end_here()


def train(processes, folder, *arguments, config=DEBUG_HYBRID):
    """Trains to the end; returns what it printed."""
    module = "torchtitan.train" if IS_V02 else "gdn2_titan.titan.train"
    start = f"--job.config_file={config}", f"--job.dump_folder={folder}"
    code, printed = launch(processes, module, folder, *start, *arguments)
    assert code == 0, printed[-4000:]
    return printed


def scalars(folder, tag):
    """{step: value} from all TensorBoard files of a run, the later file winning: what a user sees as the curve."""
    curve = {}
    for file in sorted(Path(folder).rglob("events.out.tfevents.*"), key=lambda f: (f.stat().st_mtime_ns, f.name)):
        events = EventAccumulator(str(file))
        events.Reload()
        if tag in events.Tags()["scalars"]:
            curve |= {event.step: event.value for event in events.Scalars(tag)}
    return curve


def tags(folder):
    found = set()
    for file in Path(folder).rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        found |= set(events.Tags()["scalars"])
    return found


LOSS, GRAD_NORM = "loss_metrics/global_avg_loss", "grad_norm"
