"""The keys under which Triton keeps kernels, made the same whatever a process calls first.

Triton (3.6) puts into a key the globals of the functions that a kernel calls, but only of those that it has read before
for another kernel. Who reads all functions in one order, before the first launch, has the same keys as another.
"""

import importlib
import pkgutil

__all__ = ["ROOMS", "settle_keys"]

ROOMS = ("gdn2_titan.ops.triton", "gdn2_titan.ops.gdn2.triton", "gdn2_titan.ops.short_conv.triton")


def settle_keys() -> None:
    """Of all kernels of the package, and of what they call; nothing where kernels are interpreted."""
    for room in ROOMS:
        for found in pkgutil.iter_modules(importlib.import_module(room).__path__, f"{room}."):
            for _, x in sorted(vars(importlib.import_module(found.name)).items()):
                getattr(x, "cache_key", None)  # a property, which remembers
