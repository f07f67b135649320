"""The grids of the recall study: mixers with as many parameters and as large a state each, on tasks, with several
learning rates and seeds. What is trained how long is fixed here."""

import dataclasses
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdn2_titan.equal import mamba_heads, with_mlp
from gdn2_titan.models import GDN2Model, GDN2ModelArgs, flavors
from gdn2_titan.models.flops import state_bytes
from gdn2_titan.models.layer import ShortConvolution

__all__ = ["LEARNING_RATES", "MIXERS", "TRACKING_TASKS", "Cell", "Experiment", "Plan", "build_model",
           "matched", "model_args", "plan", "toml_text"]  # fmt: skip

TRACKING_TASKS = ("parity", "permutations")
FLAVOR = "recall"
# Each mixer has the one of these that is best for it, by models of their own.
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
FIRST_SWEEP_SEED = 100
CHOSEN_ON = ("mqar", "overwrite", "stale")  # all recall tasks have the rates that are best for these
STEPS = 800  # softmax with convolutions solves mqar in some 450, at a rate of 3e-3
# Of the long study, on the tasks that some but not all mixers learn in 800: what they remember, not how soon.
MORE_STEPS, LEARNED = 1600, ("mqar", "overwrite")

# Fields of [gdn2] that make the mixer, by the name it has in tables and plots.
MIXERS = {
    "GDN-2": {},
    "GDN-2, b averaged": {"erase_gate": "mean"},
    "GDN-2, w averaged": {"write_gate": "mean"},
    "KDA": {"tied_gates": True},
    "Gated DeltaNet": {"tied_gates": True, "decay": "scalar"},
    "DeltaNet": {"tied_gates": True, "decay": "none"},
    "Mamba-2": {"layer_pattern": ["mamba2"]},
    "Mamba-3": {"layer_pattern": ["mamba3"]},
    "GDN-2 + window": {"layer_pattern": ["gdn2", "swa"]},
    "softmax": {"layer_pattern": ["attention"]},
    "softmax + conv": {"layer_pattern": ["attention"]},
    "GDN-2, erase up to 2": {"allow_neg_eigval": True},
}
# Short convolutions after the projections of q, k and v, as GDN-2 has them. Only the study trains this mixer.
WITH_CONV = "softmax + conv"
RECALLING = tuple(mixer for mixer in MIXERS if mixer != "GDN-2, erase up to 2")
REFLECTING = ("GDN-2", "GDN-2, erase up to 2")


def model_args(fields: dict[str, Any]) -> GDN2ModelArgs:
    """The study's model with these fields of [gdn2]."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return dataclasses.replace(flavors[FLAVOR], **fields)


def _model(args: GDN2ModelArgs, with_conv: bool) -> GDN2Model:
    model = GDN2Model(args)
    if with_conv:
        for block in model.layers.values():
            for name in ("q_proj", "k_proj", "v_proj"):
                linear = getattr(block.mixer, name)
                setattr(block.mixer, name, nn.Sequential(linear, ShortConvolution(linear.out_features, args.conv_size)))
    return model


def _count(args: GDN2ModelArgs, with_conv: bool) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in _model(args, with_conv).parameters())


def matched(mixer: str, shape: dict[str, Any]) -> dict[str, Any]:
    """The fields of [gdn2] for a mixer: those of ``shape``, its own, and what they leave open: the MLP's size that
    brings its parameters to those of GDN-2 in that shape; as many heads of Mamba as make a memory of as many numbers;
    and the window that keeps as much as a GDN-2 layer does (what full attention keeps grows instead)."""
    return shape | MIXERS[mixer] | _solved(mixer, tuple(shape.items()))


@functools.cache
def _solved(mixer: str, shape: tuple[tuple[str, Any], ...]) -> dict[str, int]:
    found, fields, like = {}, dict(shape) | MIXERS[mixer], model_args(dict(shape))
    pattern = fields.get("layer_pattern", ())
    if "swa" in pattern:
        layer = state_bytes(dataclasses.replace(like, n_layers=1), 1)
        window = dataclasses.replace(like, n_layers=1, layer_pattern=("swa",), window=2)
        found["window"] = 1 + round(layer / state_bytes(window, 1))
    if {"mamba2", "mamba3"}.intersection(pattern):
        found["mamba_heads"] = mamba_heads(like)
    wanted = _count(like, with_conv=False)
    args = with_mlp(model_args(fields | found), wanted, lambda args: _count(args, mixer == WITH_CONV))
    return found | {"mlp_size": args.mlp_size}


def build_model(mixer: str, fields: dict[str, Any], seed: int) -> GDN2Model:
    """The model that TorchTitan begins with for ``debug.seed = seed``, and these fields of [gdn2]."""
    model = _model(model_args(fields), False)
    torch.manual_seed(seed)
    model.init_weights()
    if mixer == WITH_CONV:
        convolved = _model(model_args(fields), True)  # whose convolutions have their initial values from their birth
        state = {name.replace("_proj.weight", "_proj.0.weight") if ".mixer." in name and "o_proj" not in name else name:
                 x for name, x in model.state_dict().items()}  # fmt: skip
        convolved.load_state_dict(state, strict=False)
        for module in convolved.modules():
            if isinstance(module, ShortConvolution):
                module.init_weights()
        return convolved
    return model


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
    chosen_on: tuple[str, ...]
    """The experiments on which its learning rates are chosen, by name"""
    model_fields: dict[str, Any] = field(default_factory=dict)
    validated: int = 128
    """Sequences under each condition, a multiple of 32"""
    label: str = ""
    """Sets it apart from another experiment on the same task"""

    @property
    def name(self) -> str:
        """As tables, rows and folders have it."""
        return f"{self.task}, {self.label}" if self.label else self.task

    def at_training_length(self) -> "Experiment":
        """The same, validated at the length trained at only."""
        return dataclasses.replace(self, task_fields=self.task_fields | {"validation_lengths": [self.seq_len]})


@dataclass(frozen=True)
class Cell:
    """One model to train."""

    experiment: Experiment
    mixer: str
    learning_rate: float
    seed: int

    @property
    def model_fields(self) -> dict[str, Any]:
        """The fields of [gdn2] that make its model."""
        return matched(self.mixer, self.experiment.model_fields)

    @property
    def name(self) -> str:
        """The name of its folder."""
        text = f"{self.experiment.name}-{self.mixer}-{self.learning_rate:g}-{self.seed}"
        return text.replace(" ", "_").replace(",", "")

    def toml(self, dump_folder: Path | str) -> str:
        """Text of the config that trains it alone, by TorchTitan; of a mixer with convolutions, without these."""
        what = self.experiment
        sections = {
            "job": {
                "description": f"recall study: {what.name}, {self.mixer}, seed {self.seed}",
                "dump_folder": str(dump_folder), "custom_config_module": "gdn2_titan.titan.job_config",
            },
            "model": {"name": "gdn2", "flavor": FLAVOR},
            "training": {
                "dataset": what.task, "local_batch_size": what.batch, "seq_len": what.seq_len, "steps": what.steps,
                "mixed_precision_param": "float32",
            },
            "task": what.task_fields | {"seed": self.seed},
            "optimizer": {"lr": self.learning_rate, "weight_decay": 0.1},
            "lr_scheduler": {"warmup_steps": 50, "decay_type": "cosine", "min_lr_factor": 0.1},
            "metrics": {"log_freq": 100},
            "gdn2": self.model_fields | {"statistics_freq": 0},
            "validation": {
                "enable": True, "dataset": what.task, "local_batch_size": 32, "seq_len": what.seq_len,
                "freq": what.steps, "steps": what.validated // 32,
            },
            "checkpoint": {"enable": True, "interval": 500, "keep_latest_k": 2},
            "debug": {"seed": self.seed},
            "activation_checkpoint": {"mode": "none"},
        }  # fmt: skip
        return toml_text(sections)


@dataclass(frozen=True)
class Plan:
    """What a study trains: first each learning rate with ``sweep_seeds`` seeds, then ``seeds`` other ones with the
    best."""

    experiments: tuple[Experiment, ...]
    sweep_seeds: int
    seeds: int
    compile: bool
    """Whether a step is compiled, which takes longer than a short study gains by it"""

    def sweep(self) -> list[Cell]:
        """The cells that choose the learning rates."""
        seeds = range(FIRST_SWEEP_SEED, FIRST_SWEEP_SEED + self.sweep_seeds)
        return [
            Cell(what.at_training_length(), mixer, rate, seed)
            for what in self.experiments if what.name in what.chosen_on
            for mixer in what.mixers for rate in LEARNING_RATES for seed in seeds
        ]  # fmt: skip

    def final(self, rates: dict[tuple[str, str], float]) -> list[Cell]:
        """The cells that are reported. rates: {(experiment, mixer): learning rate}."""
        return [
            Cell(what, mixer, rates[what.name, mixer], seed)
            for what in self.experiments for mixer in what.mixers for seed in range(self.seeds)
        ]  # fmt: skip

    def parts(self) -> list[str]:
        """A line for each experiment and mixer, that says all that its numbers follow from. A study whose lines are
        among those of another is a part of it."""
        said_otherwise = ("task", "label", "mixers", "model_fields")
        trained = {"rates": LEARNING_RATES, "sweep_seeds": self.sweep_seeds, "seeds": self.seeds}
        return [
            json.dumps({"task": what.name, "mixer": mixer}
                       | {name: x for name, x in vars(what).items() if name not in said_otherwise}
                       | {"gdn2": matched(mixer, what.model_fields)} | trained | {"compile": self.compile})
            for what in self.experiments for mixer in what.mixers
        ]  # fmt: skip


def plan(size: str, seeds: int | None = None) -> Plan:
    """The study of that size, "quick", "standard" or "long"; seeds: how many are reported, if not as many as usual. The
    standard study is a part of the long one."""
    quick = size == "quick"
    tasks = ("mqar", "stale") if quick else CHOSEN_ON
    recall = {"steps": STEPS, "seq_len": 64, "batch": 16, "chosen_on": CHOSEN_ON}
    if quick:
        recall |= {"steps": 40, "chosen_on": tasks, "validated": 64}
    symbols, lengths = {"keys": 32, "values": 8}, {"validation_lengths": [64, 256]}
    pairs = {"pairs": [2, 4, 8, 16], "validation_pairs": [4, 8, 16, 20]}
    twice = {"writes": 2, "pairs": [2, 4, 8, 12], "validation_pairs": [4, 8, 12]}
    history = {"pairs": [1, 2, 3, 4], "validation_pairs": [2, 3, 4, 5]}
    of_task = {"mqar": pairs, "overwrite": twice, "stale": history}
    experiments = [Experiment(task, RECALLING, symbols | lengths | of_task[task], **recall) for task in tasks]
    if size == "long":
        heads = {"num_heads": 4}
        swaps = {"generators": "swaps", "validation_lengths": [16, 32, 64, 128]}
        bits = {"validation_lengths": [64, 128, 256]}
        more = {"steps": MORE_STEPS, "label": f"{MORE_STEPS} steps"}
        experiments += [dataclasses.replace(what, **more) for what in experiments if what.task in LEARNED]
        experiments += [
            Experiment("permutations", REFLECTING, swaps, STEPS, 16, 96, ("permutations",), heads),
            Experiment("parity", REFLECTING, bits, 500, 64, 24, ("parity",), heads),
        ]
    return Plan(tuple(experiments), sweep_seeds=1, seeds=seeds or (2 if quick else 5), compile=not quick)
