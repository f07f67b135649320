"""The grid of the recall study: every cell is one TorchTitan config, which trains alone as well.

What is trained how long is fixed here, so that a study of the same seed is the same study.
"""

from dataclasses import dataclass, field

from .mixers import FLAVOR, matched
from .toml_text import toml_text

__all__ = ["RECALL_TASKS", "TRACKING_TASKS", "Cell", "Experiment", "grid"]


GATES = ("GDN-2", "erase only", "write only", "KDA", "Gated DeltaNet", "GDN-2 + window", "softmax")
REFLECTING = ("GDN-2", "GDN-2, erase up to 2")
RECALL_TASKS, TRACKING_TASKS = ("mqar", "overwrite"), ("parity", "permutations")


@dataclass(frozen=True)
class Experiment:
    """A task, how it is trained and under which conditions it is tested."""

    task: str
    mixers: tuple[str, ...]
    task_fields: dict
    steps: int
    seq_len: int
    batch: int
    learning_rate: float
    model_fields: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One model to train."""

    experiment: Experiment
    mixer: str
    seed: int

    @property
    def model_fields(self):
        """The fields of [gdn2] that make its model."""
        return matched(self.mixer, self.experiment.model_fields)

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
                    "local_batch_size": what.batch,
                    "seq_len": what.seq_len,
                    "steps": what.steps,
                    "mixed_precision_param": "float32",
                },
                "task": what.task_fields | {"seed": self.seed},
                "optimizer": {"lr": what.learning_rate, "weight_decay": 0.1},
                "lr_scheduler": {"warmup_steps": 50, "decay_type": "cosine", "min_lr_factor": 0.1},
                "metrics": {"log_freq": 100, "enable_tensorboard": True},
                "gdn2": self.model_fields | {"statistics_freq": 0},
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


def _experiments(quick):
    steps, counting = (800, 300) if quick else (2400, 500)
    recall, symbols = {"steps": steps, "seq_len": 64, "batch": 16, "learning_rate": 3e-3}, {"keys": 32, "values": 8}
    tracking = {"learning_rate": 2e-3, "model_fields": {"num_heads": 4}}
    lengths = {"validation_lengths": [64, 128, 256]}
    swaps = {"generators": "swaps", "validation_lengths": [16, 32, 64, 128]}
    pairs = {"pairs": [2, 4, 8, 16], "validation_pairs": [4, 8, 12, 16, 20]}
    rewritten = {"writes": 2, "pairs": [2, 4, 8, 12], "validation_pairs": [4, 6, 8, 10, 12]}
    return [
        Experiment("mqar", GATES, symbols | pairs | lengths, **recall),
        Experiment("overwrite", GATES, symbols | rewritten | lengths, **recall),
        Experiment("permutations", REFLECTING, swaps, steps=1500, seq_len=16, batch=96, **tracking),
        Experiment("parity", REFLECTING, lengths, steps=counting, seq_len=64, batch=24, **tracking),
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
