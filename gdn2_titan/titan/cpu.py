"""TorchTitan on a machine without an accelerator: the CPU as device, gloo as backend.

TorchTitan settles its device when it is imported and takes CUDA for granted. ``settle_device`` puts the CPU in the
places where that choice was stored, with a stand-in for ``torch.cuda`` that answers what TorchTitan asks of it.
"""

import os
import platform
import resource
import sys
from types import SimpleNamespace

import torch

__all__ = ["accelerator", "settle_device"]

# Every TorchTitan 0.2.2 module that keeps the device in a name of its own and that our models run through.
HOLDERS = (
    "torchtitan.tools.utils",
    "torchtitan.components.metrics",
    "torchtitan.distributed.utils",
    "torchtitan.distributed.parallel_dims",
)
# MPS is left out: torch.distributed has no backend for it.
TRAINABLE = ("cuda", "xpu", "hpu", "npu", "mtia")


class CPUDevice:
    """What TorchTitan asks a device module, answered for the CPU."""

    @staticmethod
    def set_device(device):
        pass

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def get_device_name(device=None):
        return f"CPU {platform.processor() or platform.machine()}"

    @staticmethod
    def get_device_properties(device=None):
        return SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    @staticmethod
    def memory_stats(device=None):
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit  # of the process, since its start
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    @staticmethod
    def reset_peak_memory_stats():
        pass

    @staticmethod
    def empty_cache():
        pass

    @staticmethod
    def synchronize():
        pass


def accelerator() -> str | None:
    """The accelerator that TorchTitan can train on here, or None."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device is not None and device.type in TRAINABLE else None


def settle_device() -> None:
    """Make TorchTitan use the CPU unless there is an accelerator. Call it once, before the trainer is built."""
    if accelerator() is not None:
        return
    import importlib

    for name in HOLDERS:
        module = importlib.import_module(name)
        for attribute, value in (("device_type", "cpu"), ("device_module", CPUDevice)):
            if hasattr(module, attribute):
                setattr(module, attribute, value)
