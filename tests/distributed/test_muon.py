"""Muon's trainings: every layout as one process, resumed runs as those that were not interrupted."""

import pytest

from gdn2_titan.titan.pipeline import RUNS
from gdn2_titan.titan.torchtitan_version import IS_V02

from .runs import SHORT_RUN, layouts, run_from, train
from .test_layouts import LAYOUTS

# The seed checkpoint has AdamW's state.
MUON = ("--optimizer.name=Muon", "--optimizer.muon_lr=5e-3", "--checkpoint.exclude_from_loading=optimizer")


@pytest.fixture(scope="module")
def muon_in_one_process(seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("muon")
    [curves] = train(1, folder / "out", run_from(seed, folder, 1, *MUON, SHORT_RUN))
    return curves


@pytest.mark.parametrize("name", layouts(["fsdp2-tp2", "hsdp2-cp2", "pp2"], ["fsdp2-tp2"] * IS_V02))
def test_a_layout_trains_with_muon_as_one_process(seed, muon_in_one_process, tmp_path, name):
    world, data_parallel, extra = LAYOUTS[name]
    [found] = train(world, tmp_path / "out", run_from(seed, tmp_path, data_parallel, *MUON, *extra, SHORT_RUN))
    for (loss, norm), (expected, expected_norm) in zip(found.training, muon_in_one_process.training, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, None), pytest.param("fsdp2-tp2", "fsdp2", marks=pytest.mark.slow),
     pytest.param("pp2" if RUNS else "tp2", "tp2", marks=pytest.mark.slow)],
    ids=["one process", "fsdp2-tp2 and fsdp2", "pp2 and tp2"],
)  # fmt: skip
def test_a_training_with_muon_that_was_interrupted_continues(seed, muon_in_one_process, tmp_path, before, after):
    """In one process bit for bit, under another layout to rounding; the second step after it shows the momentum."""
    for layout, steps in ((before, 1), (after, 3)):
        world, data_parallel, extra = LAYOUTS[layout] if layout else (1, 1, ())
        arguments = run_from(seed, tmp_path, data_parallel, *MUON[:2], *extra, f"--training.steps={steps}")
        if steps == 1:
            arguments.append(MUON[2])
        [found] = train(world, tmp_path / f"out{steps}", arguments)
    expected = muon_in_one_process.training[1:]
    if layout is None:
        assert found.training == expected
    for (loss, norm), (expected_loss, expected_norm) in zip(found.training, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5) and norm == pytest.approx(expected_norm, rel=1e-4)
