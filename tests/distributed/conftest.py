"""The run of one process that runs of other layouts and with other options are compared with."""

import pytest

from .runs import WHOLE_RUN, arguments, run_from, train, write_documents


@pytest.fixture(scope="session")
def seed(tmp_path_factory):
    """The folder of a file of documents and of a seed checkpoint."""
    folder = tmp_path_factory.mktemp("seed")
    write_documents(folder / "documents.jsonl")
    create = "--checkpoint.create_seed_checkpoint"
    train(1, folder / "out", arguments("debug_hybrid", folder, folder / "documents.jsonl", create))
    return folder


@pytest.fixture(scope="session")
def one_process(seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    [curves] = train(1, folder / "out", run_from(seed, folder, 1, WHOLE_RUN))
    assert len(curves.training) == 10 and len(curves.validation) == 4
    return curves
