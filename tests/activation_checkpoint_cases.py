"""How often the kernels of a checkpointed model run, and a compiler that knows nothing of other tests."""

import pytest
import torch

from gdn2_titan.ops.gdn2 import chunked
from gdn2_titan.ops.short_conv import windowed as windowed_conv1d

__all__ = ["LAYERS", "counted", "counted_calls", "fresh_compiler"]

LAYERS = 4


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    config = torch._functorch.config
    with config.patch(activation_memory_budget=1.0, is_non_builtin_to_include=False):
        yield
    torch._dynamo.reset()


def counted(set_attribute):
    """A dict that counts the runs of the mixer's and the convolution's forward kernels, compiled or not."""
    calls = {"mixer": 0, "convolution": 0}
    for name, module, function in (("mixer", chunked, "chunk_forward"), ("convolution", windowed_conv1d, "forward")):
        kernel = getattr(module, function)

        def counting(*args, name=name, kernel=kernel):
            calls[name] += 1
            return kernel(*args)

        set_attribute(module, function, counting)
    return calls


@pytest.fixture(name="calls")
def counted_calls(monkeypatch):
    return counted(monkeypatch.setattr)
