"""Changes to a flavor, as [gdn2] of a TOML file says them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from .args import GDN2ModelArgs
from .flavors import flavors

__all__ = ["ModelOverrides", "model_args_of"]


@dataclass
class ModelOverrides:
    """Fields of GDN2ModelArgs that may differ from a flavor's; None keeps what the flavor says."""

    layer_pattern: list[str] | None = None
    """Mixers of the layers, repeated: "gdn2", "swa", "attention" """
    mlp_size: int | None = None
    """Inner size of the MLPs, for models of equal parameter counts"""
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
    backend: str | None = None
    """Kernels of the GDN-2 layers: "auto", "triton", "torch" or, token by token, "reference" """

    def changes(self) -> dict[str, Any]:
        """The fields that are set, with tuples for lists."""
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelOverrides)}
        return {name: tuple(x) if isinstance(x, list) else x for name, x in said.items() if x is not None}


def model_args_of(flavor: str, overrides: ModelOverrides) -> GDN2ModelArgs:
    """The flavor's GDN2ModelArgs with the overrides. Unchecked: ``validate()`` says whether they fit together.

    Raises:
        KeyError: there is no such flavor in ``gdn2_titan.models.flavors``.
    """
    return dataclasses.replace(flavors[flavor], **overrides.changes())
