"""Which kernels serve a call: PyTorch's on any device, Triton's on GPUs."""

import torch

try:
    from .triton.target import check_target
except ImportError:  # a copy without the Triton kernels, such as ``convert.hf.save_code`` puts beside a model
    check_target = None

__all__ = ["BACKENDS", "use_triton"]

BACKENDS = ("auto", "triton", "torch")


def use_triton(name, x, backend, head_sizes=()):
    """Whether the Triton kernels serve a call on the argument ``name``; ValueError where they should and cannot."""
    if backend == "torch" or (backend == "auto" and (x.device.type != "cuda" or x.dtype == torch.float64)):
        return False
    if check_target is None:
        if backend == "triton":
            raise ValueError("backend is 'triton'; this copy of gdn2_titan has no Triton kernels, it must be 'torch'")
        return False
    check_target(name, x, head_sizes)
    return True
