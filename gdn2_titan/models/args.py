"""What a model is made of: one dataclass, checked when a model is built from it."""

import numbers
from dataclasses import dataclass, fields
from typing import Any

from .checks import check_attention, check_count, check_gdn2, check_number

__all__ = ["GDN2ModelArgs", "MIXERS"]

MIXERS = ("gdn2", "swa", "attention")
# Fields that are arguments of GatedDeltaNet2, by the same names.
GDN2_OPTIONS = (
    "num_heads", "head_dim", "num_v_heads", "expand_v", "conv_size", "erase_gate", "write_gate", "tied_gates", "decay",
    "allow_neg_eigval", "output_gate", "norm_eps", "backend",
)  # fmt: skip


@dataclass
class GDN2ModelArgs:
    """Shape of a decoder whose layers mix by GDN-2, sliding-window attention ("swa") or full causal attention.

    The mixer of layer i is ``layer_pattern[i % len(layer_pattern)]``. Gate structure: ``erase_gate`` and ``write_gate``
    per channel or one scalar per head; ``tied_gates`` makes both one scalar (Kimi Delta Attention), and with a scalar
    ``decay`` as well it is Gated DeltaNet. Defaults are those of the paper's 1.3B recurrent model.
    """

    vocab_size: int = 32000
    hidden_size: int = 2304
    n_layers: int = 18
    layer_pattern: tuple[str, ...] = ("gdn2",)
    mlp_size: int = 6208
    norm_eps: float = 1e-5
    # What training starts from; the defaults are for models as wide, and texts as long, as the paper's.
    init_std: float = 0.02  # of embeddings, head, MLPs and softmax layers
    mixer_gain: float = 2**-2.5  # of Xavier, for the projections of GDN-2 layers
    dt_min: float = 1e-3  # softplus(dt_bias) is log-uniform from here
    dt_max: float = 1e-1  # to here; times A, up to 16, it is the decay in nats per token
    # GDN-2 layers
    num_heads: int = 16
    head_dim: int = 128
    num_v_heads: int | None = None
    expand_v: float = 1.0
    conv_size: int = 4
    erase_gate: str = "channel"
    write_gate: str = "channel"
    tied_gates: bool = False
    decay: str = "channel"
    allow_neg_eigval: bool = False
    output_gate: str = "silu"
    # softmax layers
    attn_heads: int = 18
    attn_kv_heads: int | None = None
    window: int = 2048
    rope_theta: float = 10000.0
    # How it is computed, not what: "triton", "torch", or "auto", which takes Triton's kernels where they can serve.
    backend: str = "auto"

    def __post_init__(self) -> None:
        # Numbers of other libraries become Python's, which files can hold.
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):
                setattr(self, field.name, int(value) if isinstance(value, numbers.Integral) else float(value))

    def mixer(self, layer: int) -> str:
        """The mixer's name for a layer index."""
        return self.layer_pattern[layer % len(self.layer_pattern)]

    def mixers(self) -> set[str]:
        """The names of all mixers that the model has."""
        return {self.mixer(layer) for layer in range(self.n_layers)}

    def gdn2_options(self) -> dict[str, Any]:
        """What GatedDeltaNet2 is made with, besides the hidden size."""
        return {name: getattr(self, name) for name in GDN2_OPTIONS}

    def validate(self) -> None:
        """Raise ValueError, one sentence with field, value and what is allowed, unless a model can be built."""
        for field in ("vocab_size", "hidden_size", "n_layers", "mlp_size", "attn_heads", "window"):
            check_count(field, getattr(self, field))
        names = self.layer_pattern
        if not isinstance(names, (tuple, list)) or not names or any(name not in MIXERS for name in names):
            said = list(names) if isinstance(names, (tuple, list)) else names
            raise ValueError(f"layer_pattern is {said!r}; it must be a non-empty list of: {', '.join(MIXERS)}")
        check_gdn2(**self.gdn2_options())
        for field in ("init_std", "mixer_gain", "dt_min", "dt_max", "rope_theta"):
            check_number(field, getattr(self, field))
        if self.dt_max < self.dt_min:
            raise ValueError(f"dt_max is {self.dt_max}; it must be at least dt_min = {self.dt_min}")
        if self.attn_kv_heads is not None:
            check_count("attn_kv_heads", self.attn_kv_heads)
        if self.mixers() - {"gdn2"}:
            check_attention(self.hidden_size, self.attn_heads, self.attn_kv_heads, "attn_heads", "attn_kv_heads")
