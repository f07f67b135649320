"""What every test runs under."""

import os
from pathlib import Path

import pytest
import torch

from tests.composability import Recorder
from tests.concerns import concerns_titan

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or datasets reads it: no test asks the network

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, on CPU tensors. Triton reads this when it decorates a kernel.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    parser.addoption("--composability", metavar="FILE", help="=FILE: write a table of what the mixer composes with")
    parser.addoption("--only-titan", action="store_true", help="only the files that concern TorchTitan")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--only-titan"):
        others = [item for item in items if not concerns_titan(item.path)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if concerns_titan(item.path)]


def pytest_configure(config):
    # Workers of pytest-xdist report to the process that has them, and it writes.
    if (path := config.getoption("--composability")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(path)))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small: a second thread costs more than it helps, and CI has two cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
