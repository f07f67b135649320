"""The PyTorch operators within a call that would start a kernel on a GPU, and the bytes that they move."""

import collections
import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Operators", "bytes_of"]

# Start nothing, though PyTorch does not call them views.
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
FILLS = ("new_zeros", "zeros_like")  # read nothing of the tensor that they are given


class Operators(TorchDispatchMode):
    """Adds to ``rows`` the PyTorch operators that would start a kernel on a GPU, also inside this package's ops:
    launches and bytes, each operator reading and writing its tensors once."""

    def __init__(self):
        super().__init__()
        self.paused = False
        self.begin()

    def begin(self) -> dict[str, collections.Counter]:
        """New ``rows``, which are filled from here on."""
        self.rows = collections.defaultdict(collections.Counter)
        return self.rows

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        with self:
            if func.namespace == "gdn2_titan":  # into its body
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            read, written = 0 if name in FILLS else bytes_of((args, kwargs)), bytes_of(result)
            both = read + written
            self.rows[f"aten.{name}"].update(launches=1, loaded=read, stored=written, issued=both, distinct=both)
        return result


def bytes_of(tree: object) -> int:
    """Of the tensors in an operator's arguments or results; what is expanded is there once."""
    total = 0
    for x in torch.utils._pytree.tree_leaves(tree):
        if isinstance(x, torch.Tensor):
            total += x.itemsize * math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return total
