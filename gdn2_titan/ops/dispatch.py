"""Which kernels serve a call: PyTorch's on any device, Triton's on GPUs where they can."""

import logging
from collections.abc import Sequence

import torch

from .elementwise import BATCH_INVARIANT

try:
    from .triton.target import obstacle, obstacle_on
except ImportError:  # a copy without the Triton kernels, such as ``convert.hf.save_code`` puts beside a model

    def obstacle_on(device):
        return f"is on {device}; this copy of gdn2_titan has no Triton kernels"

    def obstacle(x, head_sizes):
        return obstacle_on(x.device)


__all__ = ["BACKENDS", "triton_can_serve", "triton_serves_device", "use_triton"]

BACKENDS = ("auto", "triton", "torch")
_logger = logging.getLogger(__name__)
_said = set()


def _on_gpu(device):
    return device.type == "cuda"


def use_triton(name: str, x: torch.Tensor, backend: str, head_sizes: Sequence[int] = ()) -> bool:
    """Whether the Triton kernels serve a call on the argument ``name``; for bodies of operators, which nothing traces.

    Where "auto" cannot have them on a GPU it takes PyTorch's, and says so in the log, once for each reason.

    Raises:
        ValueError: backend is "triton", and they cannot serve the call; or "batch_invariant", and it is no CPU's.
    """
    if backend == BATCH_INVARIANT:
        if x.device.type != "cpu":
            raise ValueError(f"{name} is on {x.device}; with backend={backend!r} it must be on the CPU")
        return False
    if backend == "torch" or (backend == "auto" and not _on_gpu(x.device)):
        return False
    found = obstacle(x, head_sizes)
    if found is None:
        return True
    if backend == "triton":
        subject = name if obstacle_on(x.device) is None else f"backend is 'triton' and {name}"
        raise ValueError(f"{subject} {found}, use backend='torch'")
    if found not in _said:
        _said.add(found)
        _logger.warning("The PyTorch kernels serve a call that the Triton kernels cannot: %s %s", name, found)
    return False


def triton_can_serve(x: torch.Tensor, backend: str, head_sizes: Sequence[int] = ()) -> bool:
    """What ``use_triton`` would say, where a compiler may trace it: it writes no log and raises nothing."""
    return backend not in ("torch", BATCH_INVARIANT) and _on_gpu(x.device) and obstacle(x, head_sizes) is None


def triton_serves_device(device: torch.device, backend: str) -> bool:
    """Whether a model on a device may run kernels made of Triton, flex attention's among them."""
    return backend not in ("torch", "reference", BATCH_INVARIANT) and not (
        _on_gpu(device) and obstacle_on(device) is not None
    )
