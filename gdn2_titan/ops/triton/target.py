"""What the kernels run on: NVIDIA from Ampere on, AMD, or Triton's interpreter on a CPU; nothing else.

Does not import Triton, so that the obstacles can be had where it is not installed.
"""

import importlib.util
import os
from collections.abc import Sequence

import torch

__all__ = ["MAX_HEAD_SIZE", "arch", "interpreted", "obstacle", "obstacle_on", "precision", "processors"]

MAX_HEAD_SIZE = 256
OLDEST = (8, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _installed():
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # somebody blocks it, or left a module without a spec in its place
        return False


INSTALLED = _installed()


def interpreted() -> bool:
    """Whether Triton was told to interpret its kernels, which then run on CPU tensors. It decides when it decorates."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def capability(device):
    """That of an NVIDIA GPU, such as (8, 0); None for all else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def obstacle_on(device: torch.device) -> str | None:
    """Why no kernel runs on a device, as the rest of a sentence, or None. A compiler may trace it."""
    if device.type != "cuda" and not interpreted():
        return f"is on {device}; it must be on a GPU"
    if not INSTALLED:
        return f"is on {device}; the package triton must be installed"
    found = capability(device)
    if found is not None and found < OLDEST:
        return "is on a GPU of sm_{}{}; it must be sm_80 or newer".format(*found)
    return None


def obstacle(x: torch.Tensor, head_sizes: Sequence[int]) -> str | None:
    """The same of a call on x whose heads have these sizes."""
    found = obstacle_on(x.device)
    if found is not None:
        return found
    if x.dtype not in DTYPES:
        return f"has dtype {x.dtype}; for the Triton kernels it must be float16, bfloat16 or float32"
    for size in head_sizes:
        if size > MAX_HEAD_SIZE:
            return f"has head size {size}; for the Triton kernels it must be at most {MAX_HEAD_SIZE}"
    return None


def arch(x: torch.Tensor) -> int | str:
    """The architecture that x is on: 80, 90, 100, ... for NVIDIA, a name like "gfx942" for AMD, 0 interpreted."""
    if x.device.type != "cuda":
        return 0
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(x.device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def processors(x: torch.Tensor) -> int:
    """How many programs run side by side on x's GPU, one to a multiprocessor; an H100's where there is none."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 132


def precision(architecture: int | str, dtype: torch.dtype) -> str:
    """How fp32 is multiplied in kernels of this dtype: on NVIDIA as TF32, three products for fp32 tensors, which keep
    21 bits; AMD's matrix cores and the interpreter take fp32 as it is."""
    if not isinstance(architecture, int) or not architecture:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"
