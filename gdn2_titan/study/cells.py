"""The grid of the recall study: mixers with as many parameters and as large a state each, on tasks. Every cell is one
TorchTitan config, which trains alone as well; what is trained how long is fixed here."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gdn2_titan.models import GDN2Model, GDN2ModelArgs, flavors
from gdn2_titan.models.flops import state_bytes

__all__ = ["MIXERS", "RECALL_TASKS", "TRACKING_TASKS", "Cell", "Experiment", "grid", "matched", "model_args",
           "parameters", "toml_text"]  # fmt: skip

GATES = ("GDN-2", "erase only", "write only", "KDA", "Gated DeltaNet", "GDN-2 + window", "softmax")
REFLECTING = ("GDN-2", "GDN-2, erase up to 2")
RECALL_TASKS, TRACKING_TASKS = ("mqar", "overwrite"), ("parity", "permutations")
FLAVOR = "recall"

# Fields of [gdn2] that make the mixer, by the name it has in tables and plots.
MIXERS = {
    "GDN-2": {},
    "erase only": {"write_gate": "scalar"},
    "write only": {"erase_gate": "scalar"},
    "KDA": {"tied_gates": True},
    "Gated DeltaNet": {"tied_gates": True, "decay": "scalar"},
    "GDN-2 + window": {"layer_pattern": ["gdn2", "swa"]},
    "softmax": {"layer_pattern": ["attention"]},
    "GDN-2, erase up to 2": {"allow_neg_eigval": True},
}


def model_args(fields: dict[str, Any]) -> GDN2ModelArgs:
    """The study's model with these fields of [gdn2]."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return dataclasses.replace(flavors[FLAVOR], **fields)


def parameters(args: GDN2ModelArgs) -> int:
    """Number of parameters of a model."""
    with torch.device("meta"):
        return sum(p.numel() for p in GDN2Model(args).parameters())


def matched(mixer: str, shape: dict[str, Any]) -> dict[str, Any]:
    """The fields of [gdn2] for a mixer: those of ``shape``, its own, the MLP's size that brings its parameters closest
    to those of GDN-2 in that shape, and the window that keeps as much as a GDN-2 layer does (what full attention keeps
    grows instead)."""
    fields, like = shape | MIXERS[mixer], model_args(shape)
    if "swa" in fields.get("layer_pattern", ()):
        layer = state_bytes(dataclasses.replace(like, n_layers=1), 1)
        window = dataclasses.replace(like, n_layers=1, layer_pattern=("swa",), window=2)
        fields["window"] = 1 + round(layer / state_bytes(window, 1))
    smallest, next_one = (parameters(model_args(fields | {"mlp_size": size})) for size in (1, 2))
    fields["mlp_size"] = max(1, 1 + round((parameters(like) - smallest) / (next_one - smallest)))
    return fields


def toml_text(sections: dict[str, dict[str, Any]]) -> str:
    """``{"training": {"steps": 10}}`` as TOML: sections of texts, numbers, truth values and lists of them."""
    blocks = []
    for name, fields in sections.items():
        # Of these kinds, JSON's notation is TOML's.
        lines = (f"{field} = {json.dumps(value)}\n" for field, value in fields.items())
        blocks.append(f"[{name}]\n" + "".join(lines))
    return "\n".join(blocks)


@dataclass(frozen=True)
class Experiment:
    """A task, how it is trained and under which conditions it is tested."""

    task: str
    mixers: tuple[str, ...]
    task_fields: dict[str, Any]
    steps: int
    seq_len: int
    batch: int
    learning_rate: float
    model_fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One model to train."""

    experiment: Experiment
    mixer: str
    seed: int

    @property
    def model_fields(self) -> dict[str, Any]:
        """The fields of [gdn2] that make its model."""
        return matched(self.mixer, self.experiment.model_fields)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.experiment.task}-{self.mixer}-{self.seed}".replace(" ", "_").replace(",", "")

    def toml(self, dump_folder: Path | str) -> str:
        """Text of the config that trains it."""
        what = self.experiment
        sections = {
            "job": {
                "description": f"recall study: {what.task}, {self.mixer}, seed {self.seed}",
                "dump_folder": str(dump_folder), "custom_config_module": "gdn2_titan.titan.job_config",
            },
            "model": {"name": "gdn2", "flavor": FLAVOR},
            "training": {
                "dataset": what.task, "local_batch_size": what.batch, "seq_len": what.seq_len, "steps": what.steps,
                "mixed_precision_param": "float32",
            },
            "task": what.task_fields | {"seed": self.seed},
            "optimizer": {"lr": what.learning_rate, "weight_decay": 0.1},
            "lr_scheduler": {"warmup_steps": 50, "decay_type": "cosine", "min_lr_factor": 0.1},
            "metrics": {"log_freq": 100, "enable_tensorboard": True},
            "gdn2": self.model_fields | {"statistics_freq": 0},
            "validation": {
                "enable": True, "dataset": what.task, "local_batch_size": 32, "seq_len": what.seq_len,
                "freq": what.steps, "steps": 8,
            },
            "checkpoint": {"enable": True, "interval": 500, "keep_latest_k": 2},
            "debug": {"seed": self.seed},
            "activation_checkpoint": {"mode": "none"},
        }  # fmt: skip
        return toml_text(sections)


def grid(quick: bool, seeds: int | None = None) -> list[Cell]:
    """The cells of the study, the longest trainings first; seeds: how many of each."""
    steps, counting = (800, 300) if quick else (2400, 500)
    recall, symbols = {"steps": steps, "seq_len": 64, "batch": 16, "learning_rate": 3e-3}, {"keys": 32, "values": 8}
    tracking = {"learning_rate": 2e-3, "model_fields": {"num_heads": 4}}
    lengths = {"validation_lengths": [64, 128, 256]}
    swaps = {"generators": "swaps", "validation_lengths": [16, 32, 64, 128]}
    pairs = {"pairs": [2, 4, 8, 16], "validation_pairs": [4, 8, 12, 16, 20]}
    rewritten = {"writes": 2, "pairs": [2, 4, 8, 12], "validation_pairs": [4, 6, 8, 10, 12]}
    experiments = [
        Experiment("mqar", GATES, symbols | pairs | lengths, **recall),
        Experiment("overwrite", GATES, symbols | rewritten | lengths, **recall),
        Experiment("permutations", REFLECTING, swaps, steps=1500, seq_len=16, batch=96, **tracking),
        Experiment("parity", REFLECTING, lengths, steps=counting, seq_len=64, batch=24, **tracking),
    ]
    seeds = range(seeds or (1 if quick else 3))
    return [Cell(what, mixer, seed) for what in experiments for seed in seeds for mixer in what.mixers]
