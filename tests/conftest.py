"""What every test runs under."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, on CPU tensors. Triton reads this when it decorates a kernel.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small: a second thread costs more than it helps, and CI has two cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
