"""What a model is made of: one dataclass, checked when a model is built from it."""

import numbers
from dataclasses import dataclass, fields
from typing import Any

from .checks import check_attention, check_choice, check_count, check_gdn2, check_mamba, check_number, check_turned

__all__ = ["GDN2ModelArgs", "INITS", "MIXERS", "SOFTMAX"]

SOFTMAX = ("swa", "attention")  # the mixers that keep keys and values; all others keep a state
MIXERS = ("gdn2", *SOFTMAX, "mamba2", "mamba3")
INITS = ("ours", "release")
# Fields that are arguments of GatedDeltaNet2, by the same names.
GDN2_OPTIONS = (
    "num_heads", "head_dim", "num_v_heads", "expand_v", "conv_size", "erase_gate", "write_gate", "tied_gates", "decay",
    "allow_neg_eigval", "output_gate", "norm_eps", "backend", "lower_bound", "decay_rank", "gate_rank",
    "content_gate",
)  # fmt: skip


@dataclass
class GDN2ModelArgs:
    """Shape of a decoder whose layers mix by GDN-2, Mamba-2, Mamba-3, sliding-window attention ("swa") or full causal
    attention.

    The mixer of layer i is ``layer_pattern[i % len(layer_pattern)]``. Gate structure: ``erase_gate`` and ``write_gate``
    per channel, one scalar per head, or averaged over a head's channels; ``tied_gates`` makes both one scalar (Kimi
    Delta Attention), and with a scalar ``decay`` as well it is Gated DeltaNet, with none
    DeltaNet. Default shapes are those of the paper's
    1.3B recurrent model.

    ``init``: what training starts from. "ours": normal with ``init_std``, and whatever adds to the residual stream
    divided by sqrt(2 n_layers). "release", as the authors' code starts: head, MLPs and softmax layers uniform in
    +-1 / sqrt(fan-in), what adds to the residual stream divided likewise, but not the output of GDN-2 layers. All else
    is alike: embeddings have ``init_std``, GDN-2 projections ``mixer_gain``.
    """

    vocab_size: int = 32000
    hidden_size: int = 2304
    n_layers: int = 18
    layer_pattern: tuple[str, ...] = ("gdn2",)
    mlp_size: int = 6208
    norm_eps: float = 1e-5
    # What training starts from; the defaults are for models as wide, and texts as long, as the paper's.
    init: str = "ours"
    init_std: float = 0.02  # of embeddings, and but for "release" of head, MLPs and softmax layers
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
    lower_bound: float | None = None  # of the decay, in nats per token
    # Inner size of the projections to the decay and to the output gate: "head" is the value size of a head; None and
    # "full" are one matrix of full rank.
    decay_rank: int | str | None = "head"
    gate_rank: int | str | None = "head"
    content_gate: bool = False  # the erase gate also knows what was read in the chunk before
    # Mamba-2 and Mamba-3 layers
    mamba_heads: int = 72
    mamba_head_dim: int = 64
    mamba_state: int = 64  # size of the keys, which all heads share
    mamba_rank: int = 1  # of Mamba-3: keys, values and queries of a token in each head; more than 1 is MIMO
    # softmax layers
    attn_heads: int = 18
    attn_kv_heads: int | None = None
    window: int = 2048
    rope_theta: float = 10000.0
    # How it is computed, not what: "triton", "torch", or "auto", which takes Triton's kernels where they can serve;
    # "reference", token by token; "batch_invariant", a row by itself and a token by itself, bit for bit.
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

    def softmax_mixers(self) -> set[str]:
        """The names of the mixers that are softmax attention."""
        return self.mixers() & {*SOFTMAX}

    @property
    def linear_std(self) -> float | None:
        """What head, MLPs and softmax layers start from; see ``init.linear_``."""
        return None if self.init == "release" else self.init_std

    def gdn2_options(self) -> dict[str, Any]:
        """What GatedDeltaNet2 is made with, besides the hidden size."""
        return {name: getattr(self, name) for name in GDN2_OPTIONS}

    def mamba_options(self, kind: str) -> dict[str, Any]:
        """What Mamba2 or Mamba3 is made with, besides the hidden size."""
        sizes = {"num_heads": self.mamba_heads, "head_dim": self.mamba_head_dim, "state_size": self.mamba_state}
        rank = {"rank": self.mamba_rank} if kind == "mamba3" else {}
        return {**sizes, **rank, "norm_eps": self.norm_eps, "backend": self.backend}

    def validate(self) -> None:
        """Raise ValueError, one sentence with field, value and what is allowed, unless a model can be built."""
        for field in ("vocab_size", "hidden_size", "n_layers", "mlp_size", "attn_heads", "window"):
            check_count(field, getattr(self, field))
        names = self.layer_pattern
        if not isinstance(names, (tuple, list)) or not names or any(name not in MIXERS for name in names):
            said = list(names) if isinstance(names, (tuple, list)) else names
            raise ValueError(f"layer_pattern is {said!r}; it must be a non-empty list of: {', '.join(MIXERS)}")
        check_gdn2(**self.gdn2_options())
        if self.content_gate and "gdn2" not in self.mixers():
            raise ValueError(f"content_gate is True; with layer_pattern {list(names)} it must be false, none has it")
        sizes = {name: getattr(self, name) for name in ("mamba_heads", "mamba_head_dim", "mamba_state", "mamba_rank")}
        for field, size in sizes.items():
            check_count(field, size)
        if self.mixers() & {"mamba2", "mamba3"}:
            check_mamba(sizes, self.norm_eps, self.backend)
        if "mamba3" in self.mixers():
            check_turned("mamba_state", self.mamba_state)
        check_choice("init", self.init, INITS)
        for field in ("init_std", "mixer_gain", "dt_min", "dt_max", "rope_theta"):
            check_number(field, getattr(self, field))
        if self.dt_max < self.dt_min:
            raise ValueError(f"dt_max is {self.dt_max}; it must be at least dt_min = {self.dt_min}")
        if self.attn_kv_heads is not None:
            check_count("attn_kv_heads", self.attn_kv_heads)
        if self.softmax_mixers():
            check_attention(self.hidden_size, self.attn_heads, self.attn_kv_heads, "attn_heads", "attn_kv_heads")
