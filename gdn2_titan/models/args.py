"""What a model is made of: one dataclass, checked when a model is built from it."""

from dataclasses import dataclass

__all__ = ["GDN2ModelArgs", "MIXERS"]

MIXERS = ("gdn2", "swa", "attention")
GATES = ("channel", "scalar")


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

    def mixer(self, layer):
        """The mixer's name for a layer index."""
        return self.layer_pattern[layer % len(self.layer_pattern)]

    def mixers(self):
        """The names of all mixers that the model has."""
        return {self.mixer(layer) for layer in range(self.n_layers)}

    def validate(self):
        """Raise ValueError, one sentence with field, value and what is allowed, unless a model can be built."""
        for field in (
            "vocab_size", "hidden_size", "n_layers", "mlp_size", "num_heads", "head_dim", "attn_heads", "window",
        ):  # fmt: skip
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} is {value!r}; it must be a whole number of at least 1")
        if not self.layer_pattern or any(name not in MIXERS for name in self.layer_pattern):
            allowed = ", ".join(MIXERS)
            raise ValueError(f"layer_pattern is {list(self.layer_pattern)}; it must be a non-empty list of: {allowed}")
        for field, allowed in (
            ("erase_gate", GATES), ("write_gate", GATES), ("decay", GATES), ("output_gate", ("silu", "sigmoid")),
        ):  # fmt: skip
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be {' or '.join(map(repr, allowed))}")
        if self.conv_size not in (2, 3, 4):
            raise ValueError(f"conv_size is {self.conv_size!r}; it must be 2, 3 or 4")
        v_heads = self.num_heads if self.num_v_heads is None else self.num_v_heads
        if v_heads < 1 or v_heads % self.num_heads:
            raise ValueError(f"num_v_heads is {v_heads}; it must be a multiple of num_heads = {self.num_heads}")
        value_dim = self.head_dim * self.expand_v
        if value_dim < 1 or value_dim != int(value_dim):
            raise ValueError(
                f"expand_v is {self.expand_v}; times head_dim = {self.head_dim} it must be a whole number of at least 1"
            )
        for field in ("norm_eps", "init_std", "mixer_gain", "dt_min"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be greater than 0")
        if self.dt_max < self.dt_min:
            raise ValueError(f"dt_max is {self.dt_max}; it must be at least dt_min = {self.dt_min}")
        if self.mixers() - {"gdn2"}:
            if self.hidden_size % self.attn_heads or self.hidden_size // self.attn_heads % 2:
                raise ValueError(
                    f"attn_heads is {self.attn_heads}; it must divide hidden_size = {self.hidden_size} "
                    "into heads of even size"
                )
            kv_heads = self.attn_heads if self.attn_kv_heads is None else self.attn_kv_heads
            if kv_heads < 1 or self.attn_heads % kv_heads:
                raise ValueError(f"attn_kv_heads is {kv_heads}; it must divide attn_heads = {self.attn_heads}")
            if self.rope_theta <= 0:
                raise ValueError(f"rope_theta is {self.rope_theta}; it must be greater than 0")
