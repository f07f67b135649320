"""The recall study: equal budgets, a report made of what trainings measured, the same numbers again after a kill."""

import csv
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import pytest
import torch

from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.models import GDN2Model, flavors
from gdn2_titan.models.flops import state_bytes
from gdn2_titan.study.__main__ import main
from gdn2_titan.study.cells import MIXERS, grid, matched, model_args, parameters, toml_text
from gdn2_titan.study.results import Row, accuracy_table, capacity, capacity_table, csv_text, separation_table
from gdn2_titan.study.training import LOG, RESULT
from tests import processes  # noqa: F401  says what is imported there
from tests.generations import IS_V02
from tests.study_cases import CELLS, study
from tests.training import ROOT

# ---- budgets


@pytest.mark.parametrize("mixer", MIXERS)
def test_all_mixers_have_as_many_parameters_to_half_a_percent(mixer):
    expected = sum(p.numel() for p in GDN2Model(flavors["recall"]).parameters())
    found = sum(p.numel() for p in GDN2Model(model_args(matched(mixer, {}))).parameters())
    assert abs(found - expected) <= 0.005 * expected
    assert parameters(model_args(matched(mixer, {}))) == found


@pytest.mark.parametrize("mixer", MIXERS)
def test_all_mixers_but_full_attention_keep_as_much_state_to_two_percent(mixer):
    expected, args = state_bytes(flavors["recall"], 1000), model_args(matched(mixer, {}))
    if mixer == "softmax":
        assert state_bytes(args, 2000) == 2 * state_bytes(args, 1000) > expected
    else:
        assert abs(state_bytes(args, 1000) - expected) <= 0.02 * expected
        if "swa" in args.layer_pattern:  # no other window comes closer
            windows = range(args.window - 1, args.window + 2)
            off = [abs(state_bytes(dataclasses.replace(args, window=W), 1000) - expected) for W in windows]
            assert off[1] == min(off)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("changes", [{}, {"num_v_heads": 4, "expand_v": 2.0, "conv_size": 3}, {"attn_kv_heads": 2}])
@pytest.mark.parametrize("pattern", [("gdn2",), ("gdn2", "swa"), ("attention", "swa")])
def test_state_bytes_are_those_of_the_states_that_the_layers_hand_on(pattern, changes, tokens):
    args = dataclasses.replace(flavors["recall"], layer_pattern=pattern, **changes)
    model = GDN2Model(args)
    h = model.tok_embeddings(torch.zeros(1, tokens, dtype=torch.int64))
    angles, masks = model._angles_and_masks(set(pattern) - {"gdn2"}, 1, tokens, None, h.device)
    kept = 0
    for block in model.layers.values():
        h, state = block(h, None, angles, masks.get(block.kind), return_state=True)
        kept += sum(tensor.nbytes for tensor in state)
    # The window hands on W - 1 tokens.
    assert state_bytes(args, tokens) == kept


# ---- the grid


def test_the_quick_grid_is_the_whole_one_with_one_seed_and_no_two_cells_share_a_folder():
    whole, quick = ([cell.name for cell in grid(quick)] for quick in (False, True))
    assert len(set(whole)) == len(whole)
    assert quick == [name for name in whole if name.endswith("-0")]


def test_the_config_of_every_task_and_of_every_mixer_would_start(tmp_path, monkeypatch):
    from gdn2_titan.titan.job_config import parse, validate

    monkeypatch.setenv("NGPU", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    seen = set()
    for cell in grid(quick=False):
        if not {cell.mixer, cell.experiment.task} <= seen:
            seen |= {cell.mixer, cell.experiment.task}
            config = tmp_path / f"{cell.name}.toml"
            config.write_text(cell.toml(tmp_path))
            validate(parse([f"--job.config_file={config}"]))
    assert set(MIXERS) <= seen


def test_toml_text_reads_back_as_what_it_was_made_of():
    import tomllib

    sections = {"a": {"n": 3, "x": 4e-3, "t": 'a "b"\\\n', "l": [1, 2]}, "b": {"yes": True, "names": ["gdn2", "swa"]}}
    assert tomllib.loads(toml_text(sections)) == sections


# ---- what the numbers say


def test_capacity_is_where_the_line_between_tested_numbers_of_pairs_crosses_ninety_percent():
    assert capacity({4: 1.0, 8: 0.95, 16: 0.75}) == (pytest.approx(8 + 8 * 0.05 / 0.2), False)
    assert capacity({16: 0.75, 8: 0.9, 4: 1.0}) == (pytest.approx(8.0), False)
    assert capacity({4: 0.99, 8: 0.92}) == (8.0, True)
    assert capacity({4: 0.89, 8: 0.95}) == (0.0, False)


def _row(mixer, seed, pairs, accuracy, length=64):
    return Row("mqar", mixer, seed, pairs, length, accuracy, accuracy / 2, 0.5, 1000, 2000)


def test_tables_have_the_mean_and_the_range_of_the_seeds():
    rows = [
        _row("A", seed, pairs, x) for pairs, xs in {4: (1.0, 0.9), 8: (0.5, 0.7)}.items() for seed, x in enumerate(xs)
    ]
    table = accuracy_table(rows, "pairs").splitlines()
    assert table[0] == "| mixer | 4 pairs | 8 pairs |"
    assert table[2] == "| A | 95.0% (90% to 100%) | 60.0% (50% to 70%) |"
    # Seed 0: 4 + 4 * 0.1 / 0.5 = 4.8 pairs; seed 1: 4; 2 KB of state.
    assert capacity_table(rows).splitlines()[2] == "| A | 1,000 | 2.00 | 4.4 (4.0 to 4.8) | 2.20 |"


def test_a_mixer_is_above_another_where_its_worst_seed_beats_the_other_s_best():
    found = {"A": {4: (1.0, 0.9), 8: (0.8, 0.7)}, "B": {4: (0.8, 0.89), 8: (0.7, 0.6)}}
    rows = [
        _row(mixer, seed, pairs, x)
        for mixer, of in found.items()
        for pairs, xs in of.items()
        for seed, x in enumerate(xs)
    ]
    assert separation_table(rows).splitlines()[2:] == ["| A |  | 1 |", "| B | 0 |  |"]


def test_csv_has_every_row_and_reads_back():
    rows = [_row("A, B", 0, 4, 0.123456789), dataclasses.replace(_row("A", 1, None, 1.0), task="parity")]
    found = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert [(r["mixer"], r["pairs"], r["accuracy"]) for r in found] == [("A, B", "4", "0.123457"), ("A", "", "1")]


# ---- trainings

# TorchTitan 0.3 trains them too, where there is more time.
trains = pytest.mark.slow if not IS_V02 else lambda test: test


def _start(out, jobs):
    out.parent.mkdir(exist_ok=True, parents=True)
    return subprocess.Popen(
        [sys.executable, "-m", "tests.study_cases", str(out), str(jobs)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    # The one that the ranks of other tests are forked from: who starts it first says what it imports.
    forkserver.ensure_running()
    study(out, 2)
    return out


@trains
def test_a_study_leaves_a_row_for_every_model_and_condition_and_tables_and_plots(finished):
    rows = list(csv.DictReader((finished / "results.csv").open()))
    mqar = [(r["mixer"], r["seed"], r["pairs"], r["length"]) for r in rows if r["task"] == "mqar"]
    assert len(mqar) == len(set(mqar)) == 2 * 2 * 2
    assert len(rows) == len(mqar) + 2
    for row in rows:
        result = json.loads((finished / "runs" / _name(row) / RESULT).read_text())
        (found,) = [
            x for x in result["results"] if (str(x.get("pairs", "")), str(x["length"])) == (row["pairs"], row["length"])
        ]
        assert float(row["accuracy"]) == pytest.approx(found["accuracy"], rel=1e-5)
        assert int(row["parameters"]) == result["parameters"]
    for name in ("pairs.png", "lengths.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert "## parity" in (finished / "results.md").read_text()


def _name(row):
    (cell,) = [
        c for c in CELLS if (c.experiment.task, c.mixer, str(c.seed)) == (row["task"], row["mixer"], row["seed"])
    ]
    return cell.name


def _results(out):
    return {path: path.stat().st_mtime_ns for path in out.glob(f"runs/*/{RESULT}")}


@trains
def test_an_unfinished_study_goes_on_and_ends_with_the_same_csv_with_another_number_of_jobs(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "results.csv").unlink()
    trained, untouched = (out / "runs" / cell.name for cell in CELLS[:2])
    (trained / RESULT).unlink()  # killed after its last checkpoint
    shutil.rmtree(untouched)
    done = _results(out)
    study(out, 1)
    assert (out / "results.csv").read_bytes() == (finished / "results.csv").read_bytes()
    assert len(done) == len(CELLS) - 2 and done.items() <= _results(out).items()


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_with_the_same_csv(finished, tmp_path):
    out = tmp_path / "killed" / "out"
    process = _start(out, 1)
    deadline = time.monotonic() + 500
    while not _results(out):  # one training done, the next begun or about to
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "results.csv").exists()
    done = _results(out)
    process = _start(out, 2)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert (out / "results.csv").read_bytes() == (finished / "results.csv").read_bytes()
    assert done.items() <= _results(out).items()


def test_a_folder_with_another_study_is_refused_before_anything_is_trained(tmp_path, capsys):
    cell = grid(True)[0]
    folder = tmp_path / "runs" / cell.name
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(cell.toml(folder).replace("steps =", "steps = 1"))
    assert main(["recall", "--out", str(tmp_path), "--quick"]) == 1
    assert "which has another study" in capsys.readouterr().err
    assert not (folder / LOG).exists()


@trains
def test_a_training_that_fails_is_named_and_the_others_are_done(tmp_path):
    from gdn2_titan.study.training import train_all

    good, bad = tmp_path / "good", tmp_path / "bad"
    broken = CELLS[-1].toml(bad).replace('"parity"', '"no such task"')
    with pytest.raises(ConvertError, match=f"1 of 2 trainings failed; {bad / LOG} says why"):
        train_all({bad: broken, good: CELLS[-1].toml(good)}, 1)
    assert (good / RESULT).exists() and not (bad / RESULT).exists()
    assert "is not a known source" in (bad / LOG).read_text()


@pytest.mark.parametrize("option", ["--seeds", "--jobs"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_counts_below_one_are_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        main(["recall", "--out", "x", option, value])
    assert f"is '{value}'; it must be a whole number of at least 1" in capsys.readouterr().err
