"""Which kernels a call starts on a given architecture, seen on ordinary CPU tensors and without that architecture.

Every kernel of the package is started through ``launching.launch``, and every choice that depends on the device is made
by ``target.arch``: both are replaced while a call is recorded.
"""

import contextlib
import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

from gdn2_titan.ops import triton as kernels
from gdn2_titan.ops.gdn2 import segmented
from gdn2_titan.ops.triton import launching, target

__all__ = ["Launch", "recorded"]

# Kernels ask on import whether they are interpreted: before ``recorded`` gives them another answer.
for module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
    importlib.import_module(module.name)


class Launch(NamedTuple):
    """One start of a kernel: what ``launching.launch`` was given."""

    kernel: Callable
    grid: Callable
    candidates: tuple[dict, ...]
    args: dict
    constants: dict

    @property
    def name(self):
        return self.kernel.__name__


@contextlib.contextmanager
def recorded(architecture, start=lambda launch: None, processors=132):
    """The launches within this block, in order, as if all tensors were on ``architecture`` (a value of target.arch), a
    GPU with so many processors.

    start: called with each of them in place of starting it. By default nothing runs, and the results are whatever lay
    in memory.
    """
    launches = []

    def launch(*given):
        launches.append(Launch(*given))
        start(launches[-1])

    with (
        mock.patch.object(launching, "launch", launch),
        mock.patch.object(target, "arch", lambda x: architecture),
        mock.patch.object(target, "processors", lambda x: processors),
        mock.patch.object(target, "interpreted", lambda: True),  # CPU tensors are not refused
        mock.patch.object(segmented, "triton_can_serve", lambda x, backend, head_sizes: backend == "triton"),
    ):
        yield launches
