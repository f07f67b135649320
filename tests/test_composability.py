"""The table of what the mixer composes with names tests that exist."""

import re
from pathlib import Path

import pytest

from tests.composability import FEATURES, Recorder


@pytest.mark.parametrize("feature", FEATURES)
def test_every_test_that_stands_for_a_feature_exists(feature):
    for file, prefix in FEATURES[feature]:
        names = re.findall(r"^def (test_\w+)", (Path(__file__).parent / file).read_text(), re.M)
        assert any(name.startswith(prefix) for name in names), f"{file} has no test that begins with {prefix}"


def test_one_failure_shows_in_the_row_of_its_feature(tmp_path):
    class Report:
        when, outcome, nodeid = "call", "failed", "tests/test_export.py::test_make_fx_traces[a]"

    recorder = Recorder(tmp_path / "table.md")
    recorder.pytest_runtest_logreport(Report)
    recorder.pytest_sessionfinish()
    assert "| make_fx | 1 failed |" in (tmp_path / "table.md").read_text()
    assert "| AOTInductor | not run |" in (tmp_path / "table.md").read_text()
