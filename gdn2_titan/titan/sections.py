"""The sections that this package adds to TorchTitan's config, and its own form of those on float8."""

from dataclasses import dataclass, field
from typing import Literal

from gdn2_titan.models.overrides import ModelOverrides
from gdn2_titan.parallel.float8 import EXCLUDE, MXFP8_RECIPES, SMALLEST_SIDE

__all__ = ["GDN2", "Data", "Float8Linear", "MXLinear", "Task", "compiles", "section"]


@dataclass
class GDN2(ModelOverrides):
    """[gdn2]: changes to the flavor, and how this model is trained."""

    document_resets: bool = True
    """Forget the state, and mask attention, where a packed document begins"""
    statistics_freq: int = 50
    """Write the gates' statistics to TensorBoard every so many steps (and at the first step of a run); 0: never"""


@dataclass
class Data:
    """[data]: where documents come from, beside training.dataset and training.dataset_path."""

    text_column: str = "text"
    """Column of JSON lines, Parquet or Hugging Face data that holds the text"""
    hf_subset: str | None = None
    """Name of the Hugging Face dataset's configuration"""
    hf_split: str = "train"
    """Split to train on"""
    hf_validation_split: str = "validation"
    """Split to validate on"""
    shuffle_seed: int = 0
    """Seed of the order of documents; each epoch has its own"""


@dataclass
class Task:
    """[task]: changes to the recall task that training.dataset names (None keeps what the task says)."""

    pairs: list[int] | None = None
    """Pairs of a key and a value to remember; each training sequence has one of these numbers"""
    keys: int | None = None
    """Symbols that are keys"""
    values: int | None = None
    """Symbols that are values"""
    interference: float | None = None
    """mqar: share of the gap before the questions that other pairs take, at least 0 and less than 1"""
    writes: int | None = None
    """overwrite: how often each key is written"""
    erased: float | None = None
    """selective_erase: share of the keys that are forgotten"""
    variant: str | None = None
    """needle: "s1", "s2", "s3" or "mk1" """
    needles: int | None = None
    """needle: codes that are told in variant "mk1" """
    generators: str | None = None
    """permutations: "swaps" or "all" """
    symbols: list[int] | None = None
    """copying: length of the string; each training sequence has one of these"""
    alphabet: int | None = None
    """copying: symbols that a string is made of"""
    seed: int | None = None
    """Seed of all sequences; 0 if unset"""
    validation_pairs: list[int] | None = None
    """Numbers of pairs to validate with, each with each length; those of training if unset"""
    validation_symbols: list[int] | None = None
    """copying: the same, of symbols"""
    validation_lengths: list[int] | None = None
    """Lengths to validate with; validation.seq_len if unset"""


@dataclass
class Float8Linear:
    enable_fsdp_float8_all_gather: bool = False
    """Gather weights in float8 under FSDP; with recipe "tensorwise" only"""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all gathered weights at once after each optimizer step"""
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """How tensors are scaled; "tensorwise" if unset"""
    filter_fqns: list[str] = field(default_factory=lambda: list(EXCLUDE))
    """Linear layers whose names contain one of these stay in high precision"""
    smallest_side: int = SMALLEST_SIDE
    """Linear layers with a shorter side stay in high precision"""
    emulate: bool = False
    """Round to float8, multiply in high precision: on any device, compiled or not"""


@dataclass
class MXLinear:
    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """To be left out: torchao chooses the kernel itself"""
    recipe_name: Literal[MXFP8_RECIPES] = MXFP8_RECIPES[0]
    """The second computes the weights' gradients in high precision"""
    filter_fqns: list[str] = field(default_factory=lambda: list(EXCLUDE))
    """Linear layers whose names contain one of these stay in high precision"""
    smallest_side: int = SMALLEST_SIDE
    """Linear layers with a shorter side stay in high precision"""
    emulate: bool = False
    """Round to MXFP8, multiply in high precision: on any device, compiled or not"""


def section(job_config, name):
    """A section of ours, or its defaults where the job config is a fork's own and does not have it."""
    return getattr(job_config, name, None) or {"gdn2": GDN2, "data": Data, "task": Task}[name]()


def compiles(job_config, component):
    """Whether [compile] asks for a component: "model" or "loss"."""
    return job_config.compile.enable and component in job_config.compile.components
