"""What tests do to the launches of Triton's kernels."""

import contextlib

import torch
from triton.runtime.interpreter import InterpreterBuilder

from gdn2_titan.ops.gdn2 import chunked
from gdn2_titan.ops.triton import launching
from tests.gdn2_cases import DEVICE

# Of opcheck, what depends on the kernels: the rest is of the operator, and the tests of PyTorch's kernels run it.
OPCHECKS = ("test_schema", "test_faketensor")
FENCE, MARK = 4096, 77  # elements: more than a chunk of any of the tensors of a small test


def with_other_candidates(monkeypatch, choose):
    """Make each launch run choose(its candidates) instead of them."""
    launch = launching.launch

    def chosen(kernel, grid, candidates, args, constants):
        launch(kernel, grid, (choose(candidates),), args, constants)

    monkeypatch.setattr(launching, "launch", chosen)


def narrow(candidates):
    """The default with blocks of 16 channels."""
    return {name: 16 if name.startswith("B") else x for name, x in candidates[0].items()}


def _watch_reads(monkeypatch, bounds):
    """Make the interpreter fail where a kernel reads an address that is in none of ``bounds``, [(first, end)]."""
    load = InterpreterBuilder.create_masked_load

    def watched(self, ptrs, mask, *rest):
        addresses = ptrs.data[mask.data.astype(bool)].astype("int64")
        inside = sum((first <= addresses) & (addresses < end) for first, end in bounds)
        assert addresses.size == 0 or inside.all(), "a kernel reads outside its tensors"
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)


def fenced(monkeypatch):
    """Put each tensor of a launch inside a larger one, and fail if a kernel writes outside, or, interpreted, reads
    there. Returns the names of the kernels launched, a set that fills."""
    launch, launched, bounds = launching.launch, set(), []
    _watch_reads(monkeypatch, bounds)

    def start(kernel, grid, candidates, args, constants):
        given = {name: x for name, x in args.items() if isinstance(x, torch.Tensor)}
        buffers = {name: x.new_full((FENCE + x.numel() + FENCE,), MARK) for name, x in given.items()}
        inner = {name: buffers[name][FENCE:-FENCE].view(x.shape).copy_(x) for name, x in given.items()}
        bounds[:] = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in inner.values()]
        launch(kernel, grid, candidates, args | inner, constants)
        for name, x in given.items():
            for edge in (buffers[name][:FENCE], buffers[name][-FENCE:]):
                assert torch.equal(edge, torch.full_like(edge, MARK)), f"{kernel.__name__} writes outside {name}"
            if not torch.equal(inner[name], x):  # an output: autograd must not take inputs for modified
                x.copy_(inner[name])
        launched.add(kernel.__name__)

    monkeypatch.setattr(launching, "launch", start)
    return launched


@contextlib.contextmanager
def memory_of_nan():
    """While algorithms must be deterministic, PyTorch fills fresh memory with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def without_pytorchs_kernels(monkeypatch):
    """Make them fail where they are called."""

    def refuse(*args, **kwargs):
        raise AssertionError("the PyTorch kernels ran in place of Triton's")

    for name in ("chunk_forward", "chunk_backward", "segment_forward"):
        monkeypatch.setattr(chunked, name, refuse)
