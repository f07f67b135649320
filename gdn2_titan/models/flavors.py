"""Named model shapes, and changes to them as [gdn2] of a TOML file says them.

1.3B and 1.3B_hybrid are the paper's (arXiv 2605.22791): 1,302,638,112 and 1,300,314,384 parameters in the blocks.
370M is the shape of the public weights of that name: 380,603,648 parameters in all. 370M_hybrid is our own: layers and
softmax heads as the authors' 1.3B hybrid has them, and the MLP that comes nearest to 370M in steps of 64 (379,324,544).
150M_hybrid has within 0.3% as many parameters in its blocks as 150M.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from .args import GDN2ModelArgs

__all__ = ["ModelOverrides", "flavors", "model_args_of"]

# The byte-level tokenizer that ships with the plug has 259 symbols; the rest of 264 keeps sides multiples of 8.
_BYTES = 264

_debug = {
    "vocab_size": _BYTES, "hidden_size": 128, "n_layers": 4, "mlp_size": 352,
    "num_heads": 2, "head_dim": 64, "attn_heads": 4, "attn_kv_heads": 2, "window": 128,
    "mamba_heads": 8, "mamba_head_dim": 32, "mamba_state": 32,
}  # fmt: skip

flavors: dict[str, GDN2ModelArgs] = {
    "debug": GDN2ModelArgs(**_debug),
    "debug_hybrid": GDN2ModelArgs(**_debug, layer_pattern=("gdn2", "swa")),
    "recall": GDN2ModelArgs(
        vocab_size=_BYTES, hidden_size=64, n_layers=2, mlp_size=128,
        num_heads=2, head_dim=16, attn_heads=4, attn_kv_heads=1, window=16,
        mamba_heads=4, mamba_head_dim=16, mamba_state=16,
        init_std=0.1, mixer_gain=0.7, dt_min=1e-4, dt_max=1e-2,
    ),
    "150M": GDN2ModelArgs(hidden_size=768, n_layers=12, mlp_size=2048, num_heads=6, attn_heads=12),
    "150M_hybrid": GDN2ModelArgs(
        hidden_size=768, n_layers=12, mlp_size=2384, num_heads=6, attn_heads=12, layer_pattern=("gdn2", "swa")
    ),
    "370M": GDN2ModelArgs(hidden_size=1024, n_layers=16, mlp_size=2048, attn_heads=8),
    "370M_hybrid": GDN2ModelArgs(
        hidden_size=1024, n_layers=16, mlp_size=3520, attn_heads=8, layer_pattern=("gdn2", "swa")
    ),
    "400M": GDN2ModelArgs(hidden_size=1024, n_layers=24, mlp_size=2816, num_heads=8, attn_heads=16),
    "1.3B": GDN2ModelArgs(),
    "1.3B_hybrid": GDN2ModelArgs(mlp_size=6784, layer_pattern=("gdn2", "swa")),
}  # fmt: skip


@dataclass
class ModelOverrides:
    """Fields of GDN2ModelArgs that may differ from a flavor's; None keeps what the flavor says."""

    vocab_size: int | None = None  # Symbols that embedding and head have room for
    n_layers: int | None = None  # Number of layers
    hidden_size: int | None = None  # Width between the layers; attn_heads must divide it
    layer_pattern: list[str] | None = (
        None  # Mixers of the layers, repeated: "gdn2", "mamba2", "mamba3", "swa", "attention"
    )
    mlp_size: int | None = None  # Inner size of the MLPs, for models of equal parameter counts
    num_heads: int | None = None  # Key heads of the GDN-2 layers
    num_v_heads: int | None = None  # Value heads of the GDN-2 layers, a multiple of num_heads
    head_dim: int | None = None  # Key size of a GDN-2 head
    expand_v: float | None = None  # Value size of a GDN-2 head over its key size
    conv_size: int | None = None  # Width of the short convolutions, 2 to 4
    erase_gate: str | None = None  # "channel", "scalar" or "mean" (of the channels)
    write_gate: str | None = None  # "channel", "scalar" or "mean" (of the channels)
    tied_gates: bool | None = None  # One scalar per head for both gates (Kimi Delta Attention)
    decay: str | None = None  # "channel", "scalar" or "none" (with tied_gates: Gated DeltaNet or DeltaNet)
    allow_neg_eigval: bool | None = None  # Let the erase gate span [0, 2]
    output_gate: str | None = None  # "silu" or "sigmoid"
    lower_bound: float | None = None  # Bound the decay: nats per token, less than 0, such as -5.0
    decay_rank: int | str | None = None
    """Inner size of the projection to the decay; "head" is the value size of a head, "full" one matrix of full rank"""
    gate_rank: int | str | None = None  # The same of the output gate's projection
    content_gate: bool | None = None  # Let the erase gate know what was read in the chunk before
    mamba_heads: int | None = None  # Heads of the Mamba-2 and Mamba-3 layers
    mamba_head_dim: int | None = None  # Value size of a head of theirs
    mamba_state: int | None = None  # Size of the keys that all heads of theirs share
    mamba_rank: int | None = None  # Keys, values and queries of a token in a Mamba-3 head; more than 1 is MIMO
    attn_heads: int | None = None  # Query heads of the softmax layers
    attn_kv_heads: int | None = None  # Key/value heads of the softmax layers
    window: int | None = None  # Tokens that a "swa" layer sees, the query itself included
    rope_theta: float | None = None  # Base of the rotary frequencies
    init: str | None = None  # Starting values: "ours" or "release", those of the authors' code
    backend: str | None = None
    """Kernels of the GDN-2 layers: "auto", "triton", "torch" or, token by token, "reference"; or "batch_invariant", by
    which all layers give a row the same bits whatever else is in the batch, in training as in generation, on the CPU"""

    def changes(self) -> dict[str, Any]:
        """The fields that are set, with tuples for lists."""
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelOverrides)}
        return {name: tuple(x) if isinstance(x, list) else x for name, x in said.items() if x is not None}


def model_args_of(flavor: str, overrides: ModelOverrides) -> GDN2ModelArgs:
    """The flavor's GDN2ModelArgs with the overrides, unchecked (see ``validate``). KeyError: no such flavor."""
    return dataclasses.replace(flavors[flavor], **overrides.changes())
