"""The tables that the suite writes name tests that exist, and say what they gave."""

import functools
import re
from pathlib import Path

import pytest

from tests import composability, versions
from tests.features import Recorder, features_of

ROOT = Path(__file__).resolve().parents[1]
NAMED = [(table, feature) for table in (composability, versions) for feature in table.FEATURES]


@pytest.mark.parametrize(("table", "feature"), NAMED, ids=[feature for _, feature in NAMED])
def test_every_test_that_stands_for_a_feature_exists(table, feature):
    for file, prefix, *_ in table.FEATURES[feature]:
        names = re.findall(r"^def (test_\w+)", (Path(__file__).parent / file).read_text(), re.M)
        assert any(name.startswith(prefix) for name in names), f"{file} has no test that begins with {prefix}"


class Report:
    when, longrepr = "call", None

    def __init__(self, nodeid, outcome, reason=None):
        self.nodeid, self.outcome = f"tests/{nodeid}", outcome
        if reason is not None:
            self.when, self.longrepr = "setup", ("file", 1, f"Skipped: {reason}")


def test_one_failure_shows_in_the_row_of_its_feature(tmp_path):
    path = tmp_path / "table.md"
    recorder = Recorder(composability.FEATURES, functools.partial(composability.write_document, path))
    recorder.pytest_runtest_logreport(Report("test_export.py::test_make_fx_traces[a]", "failed"))
    recorder.pytest_sessionfinish()
    assert "| make_fx | no: 1 of 1 tests failed |" in path.read_text()
    assert "| AOTInductor | not run |" in path.read_text()


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("fsdp2", {"FSDP2"}),
        ("hsdp2-cp2", {"HSDP", "context parallelism, head-tail"}),
        ("cp2-contiguous", {"context parallelism, one segment a rank"}),
        ("tp2-pp2", {"tensor and sequence parallelism", "pipeline parallelism (1F1B, interleaved)"}),
        ("hsdp2x2-partial_dtensor", {"HSDP; backend partial_dtensor"}),
    ],
)
def test_a_layout_stands_in_the_rows_of_all_that_it_combines(name, rows):
    nodeid = f"tests/distributed/test_layouts.py::test_a_layout_trains_as_one_process[{name}]"
    assert set(features_of(nodeid, versions.FEATURES)) == rows | {"gate telemetry"}


def readme(tmp_path, table):
    path = tmp_path / "README.md"
    path.write_text(f"Before\n\n{versions.BEGIN}\n{table}{versions.END}\n\nAfter | as it was\n")
    return path


def test_a_run_writes_the_column_of_its_versions_and_keeps_the_others(tmp_path):
    first, second = list(versions.FEATURES)[:2]
    path = readme(
        tmp_path, f"| | TorchTitan 9.9.9, torch 9.9 |\n| --- | --- |\n| {second} | 7 passed |\n| gone | 1 |\n"
    )
    for count in (3, 4):  # the second time in its place
        versions.write_column(path, dict.fromkeys(versions.FEATURES, f"{count} passed"))
    lines = path.read_text().splitlines()
    head = f"| | {versions.installed()} | TorchTitan 9.9.9, torch 9.9 |"  # the older version first
    table = [f"| {first} | 4 passed | not run |", f"| {second} | 4 passed | 7 passed |"]
    assert lines[:4] == ["Before", "", versions.BEGIN, head] and lines[5:7] == table
    assert len(lines) == 5 + len(versions.FEATURES) + 3 and lines[-3:] == [versions.END, "", "After | as it was"]


def test_a_row_says_why_all_of_its_tests_were_skipped(tmp_path):
    path = readme(tmp_path, "")
    recorder = Recorder(versions.FEATURES, functools.partial(versions.write_column, path))
    for layout in ("pp2", "pp2-interleaved"):
        nodeid = f"distributed/test_layouts.py::test_a_layout_trains_as_one_process[{layout}]"
        recorder.pytest_runtest_logreport(Report(nodeid, "skipped", "no | here"))
    recorder.pytest_sessionfinish()
    assert "| pipeline parallelism (1F1B, interleaved) | skipped: no / here |" in path.read_text()


def test_the_readmes_rows_are_those_that_a_run_writes():
    text = (ROOT / "docs" / "torchtitan.md").read_text()
    assert list(versions.read_table(text)[1]) == list(versions.FEATURES)
