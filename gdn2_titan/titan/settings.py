"""The settings that this package reads, under the names of TOML files, and the sections that it adds to them."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from gdn2_titan.models import GDN2ModelArgs
from gdn2_titan.models.flavors import ModelOverrides, model_args_of
from gdn2_titan.parallel.float8 import EXCLUDE, MXFP8_RECIPES, SMALLEST_SIDE

__all__ = ["GDN2", "Data", "Float8Linear", "MXLinear", "OptimizerFields", "Settings", "Task"]


@dataclass
class GDN2(ModelOverrides):
    """[gdn2]: changes to the flavor, and how this model is trained."""

    document_resets: bool = True  # Forget the state, and mask attention, where a packed document begins
    statistics_freq: int = 50
    """Write the gates' statistics to TensorBoard every so many steps (and at the first step of a run); 0: never"""


@dataclass(kw_only=True)
class OptimizerFields:
    """[optimizer]: what is not TorchTitan's."""

    weight_decay_on: Literal["matrices", "all"] = "matrices"
    """What decays: "matrices", which spares A_log, dt_bias, norms and biases, or "all" """
    muon_lr: float | None = None
    """With name "Muon", the rate of the blocks' matrices; lr, which is that of all else under AdamW, if unset"""
    muon_momentum: float = 0.95  # Share of the momentum that a step keeps
    muon_nesterov: bool = True  # Step along gradient and momentum instead of the momentum alone
    muon_ns_steps: int = 5  # Iterations that make the singular values of an update alike
    muon_adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How the rate of a matrix follows from its sides: updates as large as AdamW's, or sqrt(rows / columns)"""


@dataclass
class Data:
    """[data]: where documents come from, beside training.dataset and training.dataset_path."""

    text_column: str = "text"  # Column of JSON lines, Parquet or Hugging Face data that holds the text
    hf_subset: str | None = None  # Name of the Hugging Face dataset's configuration
    hf_split: str = "train"  # Split to train on
    hf_validation_split: str = "validation"  # Split to validate on
    shuffle_seed: int = 0  # Seed of the order of documents; each epoch has its own
    cache_dir: str | None = None
    """Folder for the tokens of local files; "gdn2_titan" in that of the datasets library if unset"""


@dataclass
class Task:
    """[task]: changes to the recall task that training.dataset names (None keeps what the task says)."""

    pairs: list[int] | None = None
    """Pairs of a key and a value to remember; each training sequence has one of these numbers"""
    keys: int | None = None  # Symbols that are keys
    values: int | None = None  # Symbols that are values
    interference: float | None = None
    """mqar: share of the gap before the questions that other pairs take, at least 0 and less than 1"""
    writes: int | None = None  # overwrite, stale, rejected, locked, version: how often each key is written
    erased: float | None = None  # selective_erase: share of the keys that are forgotten
    variant: str | None = None  # needle: "s1", "s2", "s3" or "mk1"
    needles: int | None = None  # needle: codes that are told in variant "mk1"
    generators: str | None = None  # permutations: "swaps" or "all"
    symbols: list[int] | None = None  # copying: length of the string; each training sequence has one of these
    alphabet: int | None = None  # copying: symbols that a string is made of
    seed: int | None = None  # Seed of all sequences; 0 if unset
    validation_pairs: list[int] | None = None
    """Numbers of pairs to validate with, each with each length; those of training if unset"""
    validation_symbols: list[int] | None = None  # copying: the same, of symbols
    validation_lengths: list[int] | None = None  # Lengths to validate with; validation.seq_len if unset


@dataclass
class _Linear:
    filter_fqns: list[str] = field(default_factory=lambda: list(EXCLUDE))
    """Linear layers whose names contain one of these stay in high precision"""
    smallest_side: int = SMALLEST_SIDE  # Linear layers with a shorter side stay in high precision
    emulate: bool = False
    """Round to the numbers of the format, multiply in high precision: on any device, compiled or not"""


@dataclass
class Float8Linear(_Linear):
    enable_fsdp_float8_all_gather: bool = False  # Gather weights in float8 under FSDP; with recipe "tensorwise" only
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all gathered weights at once after each optimizer step"""
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """How tensors are scaled; "tensorwise" if unset"""


@dataclass
class MXLinear(_Linear):
    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """To be left out: torchao chooses the kernel itself"""
    recipe_name: Literal[MXFP8_RECIPES] = MXFP8_RECIPES[0]
    """The second computes the weights' gradients in high precision"""


@dataclass
class Settings:
    """What a training is to do, whichever TorchTitan trains: ``settings.training.seq_len`` and so on.

    0.2.2's is filled by ``Settings.of(job_config)``, 0.3's by ``v03.trainer.settings_of(config)``. Nothing goes back
    from here into TorchTitan's config.
    """

    source: Any  # What it was filled from: a config whose ``to_dict()`` says all of it
    job: Any
    profiling: Any
    metrics: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    training: Any
    parallelism: Any
    checkpoint: Any
    activation_checkpoint: Any
    compile: Any
    quantize: Any
    comm: Any
    validation: Any
    debug: Any
    # TorchTitan 0.3 has none of these three.
    memory_estimation: Any = None
    fault_tolerance: Any = None
    experimental: Any = None
    # A fork's own job config may have none of these three.
    gdn2: GDN2 = field(default_factory=GDN2)
    data: Data = field(default_factory=Data)
    task: Task = field(default_factory=Task)

    @classmethod
    def of(cls, config: "Settings | Any") -> "Settings":
        """Of an object with the sections of a TOML file; those of this package that it lacks have their defaults."""
        if isinstance(config, Settings):
            return config
        sections = {f.name: getattr(config, f.name, None) for f in dataclasses.fields(cls)}
        return cls(**{name: found for name, found in sections.items() if found is not None} | {"source": config})

    def to_dict(self) -> dict[str, Any]:
        """All that the config said, also in sections that this package does not read."""
        return self.source.to_dict()

    def compiles(self, component: str) -> bool:
        """Whether [compile] asks for a component: "model" or "loss"."""
        return self.compile.enable and component in self.compile.components

    def model_args(self) -> GDN2ModelArgs:
        """GDN2ModelArgs of model.flavor with the changes of [gdn2]. Unchecked."""
        return model_args_of(self.model.flavor, self.gdn2)
