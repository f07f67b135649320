"""Helpers for tests that start TorchTitan as a user would, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gdn2_titan.titan.torchtitan_version import IS_V02 as HAS_TOML

ROOT = Path(__file__).resolve().parents[1]
DEBUG_HYBRID = ROOT / "train_configs" / "debug_hybrid.toml"

# A run that takes seconds: every step logged, small batches of short sequences.
SHORT = [
    "--training.seq_len=64", "--training.local_batch_size=2", "--metrics.log_freq=1", "--validation.no-enable",
    "--checkpoint.no-enable", "--lr_scheduler.warmup_steps=2",
]  # fmt: skip


def launcher(processes):
    """A command that starts a module in so many processes, without this package's script."""
    if processes == 1:
        return [sys.executable, "-m"]
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return [*run, "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "-m"]


def command(processes, folder, *arguments, config=DEBUG_HYBRID):
    """The native launch; where TorchTitan reads no TOML files, by our own module."""
    module = "torchtitan.train" if HAS_TOML else "gdn2_titan.titan.train"
    return [*launcher(processes), module, f"--job.config_file={config}", f"--job.dump_folder={folder}", *arguments]


def environment():
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | single | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def train(processes, folder, *arguments, config=DEBUG_HYBRID):
    """Run to the end; returns what it printed."""
    run = subprocess.run(
        command(processes, folder, *arguments, config=config),
        env=environment(), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    return run.stdout


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
