"""A decoder without memory for its parameters."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gdn2_titan.models import GDN2Model, GDN2ModelArgs

__all__ = ["empty_model"]


class _Unfilled(TorchFunctionMode):
    """Modules that are built in here draw no numbers, which on the meta device are none, and of which the first imports
    torch's compiler, which takes a second."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def empty_model(args: GDN2ModelArgs) -> GDN2Model:
    """GDN2Model on the meta device."""
    with torch.device("meta"), _Unfilled():
        return GDN2Model(args)
