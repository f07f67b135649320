"""Parts of mixers that transformers' Trainer does not decay. It spares biases and norms, by a part of a parameter's
name or as nn.LayerNorm's; decays, skips and scales have no such names."""

from torch import nn

from gdn2_titan.models.decay import DecayParameters
from gdn2_titan.models.mamba3 import HeadParameters
from gdn2_titan.models.mamba_parts import Skip

__all__ = ["spare_from_decay"]


class GDN2Decays(DecayParameters, nn.LayerNorm):
    extra_repr = nn.Module.extra_repr


class GDN2Skip(Skip, nn.LayerNorm):
    extra_repr = nn.Module.extra_repr


class GDN2HeadParameters(HeadParameters, nn.LayerNorm):
    extra_repr = nn.Module.extra_repr


SPARED = {DecayParameters: GDN2Decays, Skip: GDN2Skip, HeadParameters: GDN2HeadParameters}


def spare_from_decay(mixer: nn.Module) -> None:
    """Make a LayerNorm in name of each such part, in place."""
    for part in mixer.children():
        part.__class__ = SPARED.get(type(part), type(part))
