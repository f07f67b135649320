"""TorchTitan on a machine without an accelerator: the CPU as device, gloo as backend.

TorchTitan settles its device when it is imported and takes CUDA for granted. ``settle_device`` puts the CPU in the
places where that choice was stored, with a stand-in for ``torch.cuda`` that answers what TorchTitan asks of it.
"""

import functools
import importlib
import math
import os
import platform
import resource
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from .over import changed_in
from .torchtitan_version import IS_V02

__all__ = ["accelerator", "settle_device"]

# Every TorchTitan 0.2.2 module that keeps the device in a name of its own and that our models run through.
HOLDERS = ("torchtitan.tools.utils", "torchtitan.components.metrics", "torchtitan.distributed.utils",
           "torchtitan.distributed.parallel_dims")  # fmt: skip
# MPS is left out: torch.distributed has no backend for it.
TRAINABLE = ("cuda", "xpu", "hpu", "npu", "mtia")


def _memory_stats(device: Any = None) -> dict[str, int]:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit  # of the process, since its start
    return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak, "num_alloc_retries": 0, "num_ooms": 0}


_MEMORY = SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
# What TorchTitan asks a device module, answered for the CPU.
CPU_DEVICE = SimpleNamespace(
    current_device=lambda: 0,
    get_device_name=lambda device=None: f"CPU {platform.processor() or platform.machine()}",
    get_device_properties=lambda device=None: _MEMORY,
    memory_stats=_memory_stats,
    **dict.fromkeys(
        ("set_device", "reset_peak_memory_stats", "empty_cache", "synchronize"), lambda *arguments, **named: None
    ),
)


def accelerator() -> str | None:
    """The accelerator that TorchTitan can train on here, or None."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device is not None and device.type in TRAINABLE else None


def settle_device() -> None:
    """Make TorchTitan use the CPU unless there is an accelerator. Call it once, before the trainer is built."""
    if accelerator() is not None:
        return
    for name in HOLDERS:
        module = importlib.import_module(name)
        for attribute, value in (("device_type", "cpu"), ("device_module", CPU_DEVICE)):
            if hasattr(module, attribute):
                setattr(module, attribute, value)
    utils = importlib.import_module("torchtitan.tools.utils")
    utils.get_peak_flops = lambda device_name: math.inf  # stock, that of an A100
    if IS_V02:
        _profile_the_cpu(importlib.import_module("torchtitan.tools.profiling"))


def _profile_the_cpu(profiling: ModuleType) -> None:
    """TorchTitan 0.2.2 asks for None beside the CPU, where there is no GPU to profile. Again is harmless."""
    stock = profiling.torch.profiler.profile
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock, updated=())
    def profile(*, activities: Sequence[Any], **rest: Any) -> Any:
        return stock(activities=[one for one in activities if one is not None], **rest)

    changed_in(profiling, "torch")
    changed_in(profiling.torch, "profiler", profile=profile)
