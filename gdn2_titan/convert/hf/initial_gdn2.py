"""What the parts of a block start from, part by part, as transformers asks for it."""

import torch
from torch import nn

from gdn2_titan.models.args import GDN2ModelArgs
from gdn2_titan.models.decoder import Block
from gdn2_titan.models.layer import GatedDeltaNet2

__all__ = ["BlockStart"]


class BlockStart:
    """Fills the parameters of a block's parts, any of them alone, as ``Block.init_weights`` fills the whole block.

    What a projection starts from depends on where it stands, and only the block knows that. So a block of the same
    shape, without memory of its own, is filled with the part's parameters in their places: random numbers are drawn for
    these and for nothing else.
    """

    def __init__(self, args: GDN2ModelArgs, layer: int) -> None:
        self.args, self.layer = args, layer
        self._shape = None

    def fill(self, name: str, part: nn.Module) -> None:
        """Fill those parameters of ``part``, the submodule ``name`` of the block, that no file gave a value."""
        if isinstance(part, GatedDeltaNet2):
            part.statistics.zero_()  # no file has them, and loading leaves them arbitrary
        missing = {key: p for key, p in part.named_parameters(recurse=False) if _is_missing(p)}
        if not missing:
            return
        if self._shape is None:
            with torch.device("meta"):
                self._shape = Block(self.args, self.layer)
        # Not by setattr: accelerate changes what that does while it builds a model without memory.
        place = self._shape.get_submodule(name)._parameters
        empty = {key: place[key] for key in missing}
        place.update(missing)
        self._shape.init_weights()
        place.update(empty)


def _is_missing(parameter):
    # What a quantizer packs into whole numbers it made of values from a file.
    return parameter.is_floating_point() and not getattr(parameter, "_is_hf_initialized", False)
