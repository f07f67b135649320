"""Starting a kernel: the one door, with the configuration that was tuned or pinned.

Tuning measures the few candidates of a kernel once per process, for each dtype and head size, never for a length or a
number of sequences. ``GDN2_TITAN_AUTOTUNE=0`` in the environment pins the first candidate, the default; ``pin`` pins
any. Every candidate computes the same function; only rounding may differ between them.
"""

import contextlib
import os
from collections.abc import Callable

import torch
import triton

from .target import interpreted

__all__ = ["launch", "pin"]

LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")

_pinned = {}
_tuners = {}


def pin(kernel: str, **config: int) -> None:
    """Always run the kernel of this name with this configuration, e.g. pin("scan_kernel", BV=64, num_warps=4).

    kernel: the name of the kernel's function; config: num_warps, num_stages, maxnreg where wanted, and the kernel's
    block sizes, all of them. No config: tune again.
    """
    if config:
        _pinned[kernel] = config
    else:
        _pinned.pop(kernel, None)


def launch(kernel: Callable, grid: Callable, candidates: tuple[dict, ...], args: dict, constants: dict) -> None:
    """Run ``kernel`` on ``grid(meta)``. args: its tensors and numbers by name; constants: its constexprs by name, less
    those that a candidate sets; candidates: a tuple of dicts, the default first."""
    with _on_device_of(*args.values()):
        _launch(kernel, grid, candidates, args, constants)


def _on_device_of(*args):
    """Triton launches on the current device, which need not be that of the tensors."""
    device = next(x.device for x in args if isinstance(x, torch.Tensor))
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _launch(kernel, grid, candidates, args, constants):
    name = kernel.__name__
    config = _pinned.get(name)
    if config is None and (len(candidates) == 1 or interpreted() or os.environ.get("GDN2_TITAN_AUTOTUNE") == "0"):
        config = candidates[0]
    if config is not None:
        kernel[grid](**args, **constants, **config)
        return
    key = (name, *(tuple(sorted(candidate.items())) for candidate in candidates))
    if key not in _tuners:
        configs = [
            triton.Config(
                {n: x for n, x in candidate.items() if n not in LAUNCH_OPTIONS},
                **{n: x for n, x in candidate.items() if n in LAUNCH_OPTIONS},
            )
            for candidate in candidates
        ]
        # Keyed on the constants (head sizes, options) and, by Triton itself, on the dtypes of the tensors.
        _tuners[key] = triton.autotune(configs, key=list(constants))(kernel)
    _tuners[key][grid](**args, **constants)
