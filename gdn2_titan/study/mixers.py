"""The mixers that the recall study compares, with as many parameters and as large a state each."""

import dataclasses

import torch

from gdn2_titan.models import GDN2Model, GDN2ModelArgs, flavors
from gdn2_titan.models.state_size import state_bytes

__all__ = ["FLAVOR", "MIXERS", "matched", "model_args", "parameters"]

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


def model_args(fields) -> GDN2ModelArgs:
    """The study's model with these fields of [gdn2]."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return dataclasses.replace(flavors[FLAVOR], **fields)


def parameters(args):
    """Number of parameters of a model."""
    with torch.device("meta"):
        return sum(p.numel() for p in GDN2Model(args).parameters())


def matched(mixer, shape):
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
