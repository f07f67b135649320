"""The sections that this package adds to TorchTitan's job config, and the stock defaults that it changes."""

from dataclasses import dataclass, field

from torchtitan.config import JobConfig as StockJobConfig
from torchtitan.config.job_config import Checkpoint as StockCheckpoint
from torchtitan.config.job_config import Model as StockModel

from .byte_tokenizer import BYTE_TOKENIZER_DIR

__all__ = ["Data", "GDN2", "JobConfig", "section"]


@dataclass
class GDN2:
    """[gdn2]: changes to the flavor (None keeps what the flavor says), and how this model is trained."""

    layer_pattern: list[str] | None = None
    """Mixers of the layers, repeated: "gdn2", "swa", "attention" """
    num_heads: int | None = None
    """Key heads of the GDN-2 layers"""
    num_v_heads: int | None = None
    """Value heads of the GDN-2 layers, a multiple of num_heads"""
    head_dim: int | None = None
    """Key size of a GDN-2 head"""
    expand_v: float | None = None
    """Value size of a GDN-2 head over its key size"""
    conv_size: int | None = None
    """Width of the short convolutions, 2 to 4"""
    erase_gate: str | None = None
    """ "channel" or "scalar" """
    write_gate: str | None = None
    """ "channel" or "scalar" """
    tied_gates: bool | None = None
    """One scalar per head for both gates (Kimi Delta Attention)"""
    decay: str | None = None
    """ "channel" or "scalar" (with tied_gates: Gated DeltaNet)"""
    allow_neg_eigval: bool | None = None
    """Let the erase gate span [0, 2]"""
    output_gate: str | None = None
    """ "silu" or "sigmoid" """
    attn_heads: int | None = None
    """Query heads of the softmax layers"""
    attn_kv_heads: int | None = None
    """Key/value heads of the softmax layers"""
    window: int | None = None
    """Tokens that a "swa" layer sees, the query itself included"""
    rope_theta: float | None = None
    """Base of the rotary frequencies"""
    document_resets: bool = True
    """Forget the state, and mask attention, where a packed document begins"""
    statistics_freq: int = 50
    """Write the gates' statistics to TensorBoard every so many steps (and at the first step of a run); 0: never"""

    def overrides(self):
        """The fields of GDN2ModelArgs that the config sets."""
        own = ("document_resets", "statistics_freq")
        return {name: value for name, value in vars(self).items() if name not in own and value is not None}


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
class Model(StockModel):
    name: str = "gdn2"
    flavor: str = "debug"
    hf_assets_path: str = str(BYTE_TOKENIZER_DIR)


@dataclass
class Checkpoint(StockCheckpoint):
    last_save_model_only: bool = False
    """Stock TorchTitan says true; with false a finished run can be continued for more steps"""


@dataclass
class JobConfig(StockJobConfig):
    model: Model = field(default_factory=Model)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    gdn2: GDN2 = field(default_factory=GDN2)
    data: Data = field(default_factory=Data)


def section(job_config, name):
    """A section of ours, or its defaults where the job config is a fork's own and does not have it."""
    return getattr(job_config, name, None) or {"gdn2": GDN2, "data": Data}[name]()
