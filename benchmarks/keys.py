"""The keys under which Triton keeps kernels, made the same whatever a process calls first.

Triton (3.6) puts into a key the globals of the functions that a kernel calls, but only of those that it has read before
for another kernel. Who reads all functions in one order, before the first launch, has the same keys as another.
"""

import importlib
import pkgutil
from types import ModuleType

__all__ = ["kernel_modules", "settle_keys"]

ROOMS = ("gdn2_titan.ops.triton", "gdn2_titan.ops.gdn2.triton", "gdn2_titan.ops.short_conv.triton")


def kernel_modules() -> list[ModuleType]:
    """Those of the package that have kernels, or functions that kernels call."""
    return [
        importlib.import_module(found.name)
        for room in ROOMS
        for found in pkgutil.iter_modules(importlib.import_module(room).__path__, f"{room}.")
    ]


def settle_keys() -> None:
    """Of all kernels of the package, and of what they call; nothing where kernels are interpreted."""
    for module in kernel_modules():
        for _, x in sorted(vars(module).items()):
            getattr(x, "cache_key", None)  # a property, which remembers
