"""What every test runs under."""

import functools
import os
from pathlib import Path

import pytest
import torch

from tests import composability, versions
from tests.concerns import concerns_titan
from tests.features import Recorder

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or datasets reads it: no test asks the network

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, on CPU tensors. Triton reads this when it decorates a kernel.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    parser.addoption("--only-titan", action="store_true", help="only the files that concern TorchTitan")
    parser.addoption("--composability", metavar="FILE", help="=FILE: write a table of what the mixer composes with")
    parser.addoption("--versions", metavar="FILE", help="=FILE: write what works with the installed TorchTitan")


def pytest_ignore_collect(collection_path, config):
    """Of a folder, other files are not even imported; None leaves the choice to pytest."""
    other = collection_path.suffix == ".py" and not concerns_titan(collection_path)
    return (config.getoption("--only-titan") and other) or None


def pytest_collection_modifyitems(config, items):
    if config.getoption("--only-titan"):
        config.hook.pytest_deselected(items=[item for item in items if not concerns_titan(item.path)])
        items[:] = [item for item in items if concerns_titan(item.path)]


def pytest_configure(config):
    # Workers of pytest-xdist report to the process that has them, and it writes.
    if hasattr(config, "workerinput"):
        return
    tables = [("--versions", versions.FEATURES, versions.write_column)]
    if not config.getoption("--only-titan"):
        tables.append(("--composability", composability.FEATURES, composability.write_document))
    for option, features, write in tables:
        if path := config.getoption(option):
            config.pluginmanager.register(Recorder(features, functools.partial(write, Path(path))))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small: a second thread costs more than it helps, and CI has two cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
