"""What a step of a small model costs: alone by TorchTitan, beside others in the recall study, and compiled there.

    python benchmarks/recall_study.py --mixer GDN-2 --models 8 --steps 40

CPU time of one thread, which other jobs on the machine disturb less than they do the clock; compilation is said apart.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import torch

from gdn2_titan.study.batched import Batch
from gdn2_titan.study.cells import MIXERS, Cell, plan
from gdn2_titan.study.training import member
from gdn2_titan.titan.job_config import build, parse

FIRST = 3  # steps before the clock runs


class Clock:
    """CPU seconds of the process at each step."""

    def __init__(self):
        self.at = []

    def __call__(self, steps=1):
        self.at += [time.process_time()] * bool(steps)

    def milliseconds(self):
        """Of a step, the first ones left out."""
        return 1e3 * (self.at[-1] - self.at[FIRST]) / (len(self.at) - 1 - FIRST)


def alone(cell, folder):
    """A training by TorchTitan, without validation and checkpoints."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(cell.toml(folder))
    off = ["--validation.no-enable", "--checkpoint.no-enable", "--metrics.no-enable_tensorboard"]
    trainer = build(parse([f"--job.config_file={folder / 'config.toml'}", *off]))
    clock, step = Clock(), trainer.train_step
    trainer.train_step = lambda *args: (step(*args), clock())[0]
    try:
        trainer.train()
    finally:
        trainer.close()
        torch.distributed.destroy_process_group()
    return clock.milliseconds()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixer", default="GDN-2", choices=MIXERS)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    what = dataclasses.replace(plan("standard").experiments[0], steps=options.steps)
    cells = [Cell(what, options.mixer, 3e-3, seed) for seed in range(options.models)]
    with tempfile.TemporaryDirectory() as folder:
        found = {"alone": alone(cells[0], Path(folder) / "alone")}
        for name, compiled in (("side by side", False), ("side by side, compiled", True)):
            members = [member(cell, Path(folder) / name / cell.name) for cell in cells]
            clock, began = Clock(), time.process_time()
            Batch(members, Path(folder) / "none", compile=compiled).train(clock)
            found[name] = clock.milliseconds() / len(cells)
            print(f"{name}: {clock.at[0] - began:.1f} s of CPU for the first step")
    for name, value in found.items():
        print(f"{name}: {value:.1f} ms a step and model, {found['alone'] / value:.2f} times as fast as alone")


if __name__ == "__main__":
    main()
