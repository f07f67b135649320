"""The grid of the recall study: every cell is one TorchTitan config, which trains alone as well.

What is trained how long is fixed here, so that a study of the same seed is the same study.
"""

from dataclasses import dataclass

from .mixers import FLAVOR, MIXERS, matched
from .toml_text import toml_text

__all__ = ["RECALL", "TRACKING", "Cell", "Experiment", "grid"]


@dataclass(frozen=True)
class Experiment:
    """A task, how it is trained and under which conditions it is tested."""

    task: str
    steps: int
    seq_len: int
    mixers: tuple[str, ...]
    task_fields: dict
    learning_rate: float = 4e-3


@dataclass(frozen=True)
class Cell:
    """One model to train."""

    experiment: Experiment
    mixer: str
    seed: int

    @property
    def name(self):
        """The name of its folder."""
        return f"{self.experiment.task}-{self.mixer}-{self.seed}".replace(" ", "_").replace(",", "")

    def toml(self, dump_folder):
        """Text of the config that trains it."""
        what = self.experiment
        return toml_text(
            {
                "job": {
                    "description": f"recall study: {what.task}, {self.mixer}, seed {self.seed}",
                    "dump_folder": str(dump_folder),
                    "custom_config_module": "gdn2_titan.titan.job_config",
                },
                "model": {"name": "gdn2", "flavor": FLAVOR},
                "training": {
                    "dataset": what.task,
                    "local_batch_size": 16,
                    "seq_len": what.seq_len,
                    "steps": what.steps,
                    "mixed_precision_param": "float32",
                },
                "task": what.task_fields | {"seed": self.seed},
                "optimizer": {"lr": what.learning_rate, "weight_decay": 0.1},
                "lr_scheduler": {"warmup_steps": 50, "decay_type": "cosine", "min_lr_factor": 0.1},
                "metrics": {"log_freq": 100, "enable_tensorboard": True},
                "gdn2": matched(self.mixer) | {"statistics_freq": 0},
                "validation": {
                    "enable": True,
                    "dataset": what.task,
                    "local_batch_size": 32,
                    "seq_len": what.seq_len,
                    "freq": what.steps,
                    "steps": 8,
                },
                "checkpoint": {"enable": True, "interval": 500, "keep_latest_k": 2},
                "debug": {"seed": self.seed},
                "activation_checkpoint": {"mode": "none"},
            }
        )


GATES = ("GDN-2", "erase only", "write only", "KDA", "Gated DeltaNet", "GDN-2 + window", "softmax")
RECALL_TASKS, TRACKING_TASKS = ("mqar", "overwrite"), ("parity", "permutations")


def _experiments(quick):
    """RECALL: up to 16 pairs are trained on; more of them, and longer sequences, are only tested."""
    pairs = {"pairs": [2, 4, 8, 16], "keys": 32, "values": 32}
    tested = {"validation_pairs": [4, 8, 12, 16, 20], "validation_lengths": [64, 128, 256]}
    rewritten = {"pairs": [2, 4, 8], "keys": 32, "values": 32, "writes": 3}
    tested_rewritten = {"validation_pairs": [2, 4, 6, 8], "validation_lengths": [64, 128, 256]}
    steps = 1500 if quick else 3500
    bent = ("GDN-2", "GDN-2, erase up to 2")
    return [
        Experiment("mqar", steps, 64, GATES, pairs | tested),
        Experiment("overwrite", steps, 64, GATES, rewritten | tested_rewritten),
        Experiment("parity", steps // 4, 64, bent, {"validation_lengths": [64, 128, 256, 512]}),
        Experiment("permutations", steps, 64, bent, {"generators": "swaps", "validation_lengths": [64, 128, 256]}),
    ]


def grid(quick, seeds=None):
    """The cells of the study, the longest trainings first; seeds: how many of each."""
    seeds = seeds or (1 if quick else 3)
    return [
        Cell(experiment, mixer, seed)
        for experiment in _experiments(quick)
        for seed in range(seeds)
        for mixer in experiment.mixers
    ]
