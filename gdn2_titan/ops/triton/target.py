"""What the kernels run on: NVIDIA from Ampere on, AMD, or Triton's interpreter on a CPU; all else is refused.

Does not import Triton, so that the refusals can be had where it is not installed.
"""

import os

import torch

__all__ = ["MAX_HEAD_SIZE", "arch", "check_target", "interpreted", "precision"]

MAX_HEAD_SIZE = 256
OLDEST = (8, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreted():
    """Whether Triton was told to interpret its kernels, which then run on CPU tensors. It decides when it decorates."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def check_target(name, x, head_sizes):
    """Raise ValueError unless the kernels can serve the argument ``name``. head_sizes: those of the call."""
    if x.device.type != "cuda" and not interpreted():
        raise ValueError(
            f"backend is 'triton' and {name} is on {x.device}; it must be on a GPU, use backend='torch' elsewhere"
        )
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{name} has dtype {x.dtype}; for the Triton kernels it must be float16, bfloat16 or float32, "
            "use backend='torch'"
        )
    if x.device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(x.device)
        if capability < OLDEST:
            found = "sm_{}{}".format(*capability)
            raise ValueError(f"{name} is on a GPU of {found}; it must be sm_80 or newer, use backend='torch'")
    for size in head_sizes:
        if size > MAX_HEAD_SIZE:
            raise ValueError(
                f"{name} has head size {size}; for the Triton kernels it must be at most {MAX_HEAD_SIZE}, "
                "use backend='torch'"
            )


def arch(x):
    """The architecture that x is on: 80, 90, 100, ... for NVIDIA, a name like "gfx942" for AMD, 0 interpreted."""
    if x.device.type != "cuda":
        return 0
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(x.device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def precision(architecture, dtype):
    """How fp32 is multiplied in kernels of this dtype: on NVIDIA as TF32, three products for fp32 tensors, which keep
    21 bits; AMD's matrix cores and the interpreter take fp32 as it is."""
    if not isinstance(architecture, int) or not architecture:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"
