"""The GDN-2 layer, Mamba-2, Mamba-3, softmax attention and the decoder made of them. Plain torch modules."""

from .args import GDN2ModelArgs
from .decoder import GDN2Model
from .flavors import flavors
from .layer import GatedDeltaNet2, GDN2ContentState, GDN2State
from .mamba2 import Mamba2, Mamba2State
from .mamba3 import Mamba3, Mamba3State

__all__ = [
    "GDN2ContentState", "GDN2Model", "GDN2ModelArgs", "GDN2State", "GatedDeltaNet2", "Mamba2", "Mamba2State", "Mamba3",
    "Mamba3State", "flavors",
]  # fmt: skip
