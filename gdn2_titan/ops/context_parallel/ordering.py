"""An order of messages that a compiler keeps.

The graphs of two ranks differ, so a compiler may place a message whose contents depend on nothing that came before,
such as zeros, elsewhere in one graph than in the other. Two ranks then wait for each other's next message for ever.
"""

import torch
from torch import Tensor

__all__ = ["after"]


@torch.library.custom_op("gdn2_titan::after", mutates_args=())
def after(x: Tensor, earlier: Tensor) -> Tensor:
    """A copy of x that cannot be computed before ``earlier`` is."""
    return x.clone()


@after.register_fake
def _(x, earlier):
    return x.new_empty(x.shape)
