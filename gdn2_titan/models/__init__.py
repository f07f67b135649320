"""The GDN-2 layer, softmax attention and the decoder made of them. Plain torch modules."""

from .args import GDN2ModelArgs
from .decoder import GDN2Model
from .flavors import flavors
from .layer import GatedDeltaNet2, GDN2State

__all__ = ["GDN2Model", "GDN2ModelArgs", "GDN2State", "GatedDeltaNet2", "flavors"]
