"""Which kernels serve a call: PyTorch's on any device, Triton's on GPUs."""

import torch

from .triton.target import check_target

__all__ = ["BACKENDS", "use_triton"]

BACKENDS = ("auto", "triton", "torch")


def use_triton(name, x, backend, head_sizes=()):
    """Whether the Triton kernels serve a call on the argument ``name``; ValueError where they should and cannot."""
    if backend == "torch" or (backend == "auto" and (x.device.type != "cuda" or x.dtype == torch.float64)):
        return False
    check_target(name, x, head_sizes)
    return True
