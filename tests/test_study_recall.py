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
from operator import attrgetter

import pytest
import torch

from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.models import GDN2Model, flavors
from gdn2_titan.models.flops import state_bytes
from gdn2_titan.study.__main__ import main
from gdn2_titan.study.batched import Batch
from gdn2_titan.study.cells import (
    LEARNING_RATES,
    MIXERS,
    Cell,
    Experiment,
    build_model,
    matched,
    model_args,
    plan,
    toml_text,
)
from gdn2_titan.study.intervals import interval, paired_difference
from gdn2_titan.study.recall import study
from gdn2_titan.study.results import (
    Row,
    accuracy_table,
    best_rates,
    capacity,
    capacity_table,
    csv_text,
    difference_table,
    rule_rows,
    write_report,
)
from gdn2_titan.study.training import LARGEST, LOG, RESULT, batches, forget_half_compiled, member, train_all
from gdn2_titan.titan.tasks import TASKS, score_rules
from tests import processes
from tests.generations import IS_V02
from tests.study_cases import PART, PLAN, TINY, TRACK, alone
from tests.training import ROOT

# ---- budgets


@pytest.mark.parametrize("mixer", MIXERS)
def test_all_mixers_have_as_many_parameters_to_three_tenths_of_a_percent(mixer):
    expected = sum(p.numel() for p in GDN2Model(flavors["recall"]).parameters())
    found = sum(p.numel() for p in build_model(mixer, matched(mixer, {}), 0).parameters())
    assert abs(found - expected) <= 0.003 * expected


@pytest.mark.parametrize("mixer", MIXERS)
def test_all_mixers_but_full_attention_have_as_large_a_memory(mixer):
    expected, args = state_bytes(flavors["recall"], 1000), model_args(matched(mixer, {}))
    if mixer.startswith("Mamba"):  # the memory alone: what stands beside it is of another size
        numbers = args.mamba_heads * args.mamba_head_dim * args.mamba_state
        assert numbers == flavors["recall"].num_heads * flavors["recall"].head_dim ** 2
        return
    if mixer.startswith("softmax"):
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


@pytest.mark.parametrize("size", ["quick", "standard", "long"])
def test_every_mixer_has_the_same_rates_and_seeds_and_no_two_cells_share_a_folder(size):
    whole = plan(size)
    swept, rates = whole.sweep(), {}
    for what in whole.experiments:
        for mixer in what.mixers:
            of = [cell for cell in swept if cell.mixer == mixer and cell.experiment.name in what.chosen_on]
            assert {cell.learning_rate for cell in of} == set(LEARNING_RATES) and len(LEARNING_RATES) >= 3
            assert len(of) == len(LEARNING_RATES) * whole.sweep_seeds * len(what.chosen_on)
            rates[what.name, mixer] = LEARNING_RATES[0]
    final = whole.final(rates)
    assert {cell.seed for cell in final}.isdisjoint(cell.seed for cell in swept)  # or the best would be lucky
    names = [cell.name for cell in swept + final]
    assert len(set(names)) == len(names) and len({cell.seed for cell in final}) == whole.seeds
    assert size == "quick" or whole.seeds >= 5


def all_batches(whole):
    rates = {(what.name, mixer): 1e-3 for what in whole.experiments for mixer in what.mixers}
    swept = batches(whole.sweep(), attrgetter("chosen_on"))
    return swept + batches(whole.final(rates), attrgetter("name"))


def test_batches_have_every_cell_once_and_models_of_one_shape():
    found = all_batches(plan("long"))
    names = [cell.name for batch in found for cell in batch]
    assert len(names) == len(set(names)) == 11 * (3 * 3 + 5 * 5) + 2 * 2 * (3 + 5)
    for batch in found:
        assert len(batch) <= LARGEST
        assert len({(cell.mixer, cell.experiment.seq_len, cell.experiment.batch) for cell in batch}) == 1


@pytest.mark.parametrize("seeds", [None, 4, 7])
def test_the_standard_study_is_a_part_of_the_long_one_with_the_same_batches(seeds):
    standard, long = plan("standard", seeds), plan("long", seeds)
    assert set(standard.parts()) < set(long.parts())
    within = all_batches(long)
    assert all(batch in within for batch in all_batches(standard))


def test_the_config_of_every_task_and_of_every_mixer_would_start(tmp_path, monkeypatch):
    from gdn2_titan.titan.job_config import parse, validate

    monkeypatch.setenv("NGPU", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    seen = set()
    for cell in plan("long").sweep():
        if not {cell.mixer, cell.experiment.task} <= seen:
            seen |= {cell.mixer, cell.experiment.task}
            config = tmp_path / f"{cell.name}.toml"
            config.write_text(cell.toml(tmp_path))
            validate(parse([f"--job.config_file={config}"]))
    assert set(MIXERS) <= seen


def test_softmax_with_convolutions_begins_as_softmax_does_and_convolves_what_is_projected():
    fields = matched("softmax + conv", {})
    plain, convolved = build_model("softmax", fields, 3), build_model("softmax + conv", fields, 3)
    a, b = plain.layers["1"].mixer, convolved.layers["1"].mixer
    x = torch.randn(2, 9, 64)
    for name in ("q_proj", "k_proj", "v_proj"):
        linear, conv = getattr(b, name)
        assert torch.equal(linear.weight, getattr(a, name).weight)
        y = torch.nn.functional.pad(x @ linear.weight.T, (0, 0, 3, 0))
        expected = torch.nn.functional.silu(sum(conv.weight[:, i] * y[:, i : i + 9] for i in range(4)))
        torch.testing.assert_close(getattr(b, name)(x), expected)
    others = [n for n in plain.state_dict() if "mixer" not in n or "o_proj" in n]
    assert all(torch.equal(plain.state_dict()[n], convolved.state_dict()[n]) for n in others)


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
    return Row("mqar", mixer, 0.01, seed, pairs, length, accuracy, accuracy / 2, 0.5, 1000, 2000)


def test_tables_have_the_mean_and_the_range_of_the_seeds():
    rows = [
        _row("A", seed, pairs, x) for pairs, xs in {4: (1.0, 0.9), 8: (0.5, 0.7)}.items() for seed, x in enumerate(xs)
    ]
    table = accuracy_table(rows, "pairs").splitlines()
    assert table[0] == "| mixer | 4 pairs | 8 pairs |"
    assert table[2] == "| A | 95.0% (90% to 100%) | 60.0% (50% to 70%) |"
    # Seed 0: 4 + 4 * 0.1 / 0.5 = 4.8 pairs; seed 1: 4; 2 KB of state.
    assert capacity_table(rows).splitlines()[2] == "| A | 1,000 | 2.00 | 4.4 (4.0 to 4.8) | 2.20 |"


def test_an_interval_is_students():
    # Of 1, 2, 3, 4, 5: mean 3, deviation sqrt(2.5), quantile 2.776 with four degrees of freedom.
    assert interval([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - 2.776 * 0.5**0.5, 3 + 2.776 * 0.5**0.5))
    stats = pytest.importorskip("scipy.stats")
    for n in range(2, 21):
        mean, low, high = interval(range(n))
        half = stats.t.ppf(0.975, n - 1) * stats.sem(range(n))
        assert (mean - low, high - mean) == pytest.approx((half, half), rel=1e-3)


def test_differences_are_paired_by_seed():
    ours, others = {0: 0.9, 1: 0.5, 2: 0.7}, {2: 0.6, 0: 0.8, 1: 0.4}
    assert paired_difference(ours, others) == pytest.approx((0.1, 0.1, 0.1))
    rows = [
        _row(m, s, p, x - p / 1000) for m, of in (("A", ours), ("B", others)) for s, x in of.items() for p in (4, 8)
    ]
    table = difference_table(rows).splitlines()
    assert table[0] == "| points, minus | A | B |"
    assert table[2] == "| A |  | **+10.0 (+10.0 to +10.0)** |"
    rows[0] = dataclasses.replace(rows[0], accuracy=0.0)
    assert "**" not in difference_table(rows)


def test_the_best_rate_is_that_of_the_best_mean_over_tasks_at_the_length_trained_at_and_the_smallest_of_equals():
    def row(rate, seed, accuracy, length=64, mixer="A", task="mqar"):
        return dataclasses.replace(_row(mixer, seed, 4, accuracy, length), learning_rate=rate, task=task)

    def experiment(task, chosen_on, mixers=("A", "B")):
        return Experiment(task, mixers, {}, 1, 64, 1, chosen_on)

    rows = [row(1e-2, 0, 0.9), row(1e-2, 1, 0.1), row(1e-3, 0, 0.6), row(1e-3, 1, 0.6), row(3e-3, 0, 0.6)]
    rows += [row(3e-3, 1, 0.6), row(1e-2, 0, 1.0, length=256), row(1e-2, 0, 0.3, mixer="B")]
    mqar = experiment("mqar", ("mqar",))
    assert best_rates(rows, [mqar]) == {("mqar", "A"): 1e-3, ("mqar", "B"): 1e-2}
    # A task counts as much as another, whatever rows it has: 3e-3 is better by (0.6 + 0.8) / 2 to (0.6 + 0.7) / 2.
    rows += [row(1e-3, 0, 0.7, task="stale"), row(3e-3, 0, 0.8, task="stale"), row(1e-2, 0, 0.8, task="stale")]
    both = [experiment(task, ("mqar", "stale"), ("A",)) for task in ("mqar", "stale", "alias")]
    assert best_rates(rows, both) == dict.fromkeys((("mqar", "A"), ("stale", "A"), ("alias", "A")), 3e-3)


def test_rules_have_a_row_for_each_condition_and_seed_of_the_tasks_that_have_mentions():
    cells = PLAN.final({("version", m): 1e-3 for m in TINY.mixers} | {("parity", m): 1e-3 for m in TRACK.mixers})
    rows = [
        dataclasses.replace(_row("GDN-2", seed, 2, 0.5, length), task="version")
        for seed in (0, 1)
        for length in (24, 32)
    ]
    rows.append(dataclasses.replace(_row("GDN-2", 0, None, 0.5), task="parity"))
    found = rule_rows(rows, cells)
    assert [(r.mixer, r.seed, r.length) for r in found] == [
        (rule, seed, length) for seed in (0, 1) for length in (24, 32) for rule in ("first mention", "last mention")
    ]
    expected = score_rules(TASKS["version"](pairs=[2], keys=16, values=16), 32, 1, TINY.validated)["first mention"]
    assert (found[-2].accuracy, found[-2].exact) == (expected["accuracy"], expected["exact"])
    assert all(r.accuracy == 0 for r in found if r.mixer == "last mention")


def test_csv_has_every_row_and_reads_back():
    rows = [_row("A, B", 0, 4, 0.123456789), dataclasses.replace(_row("A", 1, None, 1.0), task="parity")]
    found = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert [(r["mixer"], r["pairs"], r["accuracy"]) for r in found] == [("A, B", "4", "0.123457"), ("A", "", "1")]


# ---- trainings

LONGER = dataclasses.replace(TINY, steps=4)

# TorchTitan 0.3 trains them too, where there is more time.
trains = pytest.mark.slow if not IS_V02 else lambda test: test


def members(cells, folder):
    return [member(cell, folder / cell.name) for cell in cells]


def check_batch_trains_as_torchtitan_alone(cells, folder, *, compile=False):
    batch = Batch(members(cells, folder), folder / "checkpoint.pt", compile=compile)
    batch.train()
    processes.start(alone, 1, cells, [folder / cell.name for cell in cells])
    for index, (cell, results) in enumerate(zip(cells, batch.validate(), strict=True)):
        for name, p in torch.load(folder / cell.name / "parameters.pt").items():
            # Not number by number: where a gradient is all but 0, AdamW steps by what it has of rounding.
            assert (batch.parameters(index)[name] - p).norm() <= 1e-4 * p.norm(), name
        expected = json.loads((folder / cell.name / "results.json").read_text())
        assert len(results) == len(expected)
        for found, of in zip(results, expected, strict=True):
            assert found == pytest.approx(of, rel=1e-4, abs=1e-5)


@trains
def test_models_side_by_side_are_trained_and_validated_as_torchtitan_does_each_alone(tmp_path):
    other = dataclasses.replace(LONGER, task="stale")
    check_batch_trains_as_torchtitan_alone([Cell(LONGER, "GDN-2", 3e-3, 0), Cell(other, "GDN-2", 1e-2, 1)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer not in ("GDN-2", "softmax + conv")])
def test_models_of_every_mixer_side_by_side_are_trained_as_torchtitan_does_each_alone(mixer, tmp_path):
    cells = [Cell(LONGER, mixer, 3e-3, seed) for seed in (0, 1)]
    # Of the two kinds of layers compiled, one mixer has both.
    check_batch_trains_as_torchtitan_alone(cells, tmp_path, compile=mixer == "GDN-2 + window")


def test_a_batch_that_was_killed_goes_on_from_its_checkpoint_bit_for_bit(tmp_path):
    cells = [Cell(LONGER, "GDN-2", 3e-3, 0), Cell(LONGER, "GDN-2", 1e-2, 1)]

    class Killed(Exception):
        pass

    def kill(steps, done=[]):
        done.append(steps)
        if sum(done) == 3:
            raise Killed

    whole, checkpoint = Batch(members(cells, tmp_path), tmp_path / "none", compile=False), tmp_path / "checkpoint.pt"
    whole.train()
    with pytest.raises(Killed):
        Batch(members(cells, tmp_path), checkpoint, compile=False, interval=2).train(kill)
    rest = []
    resumed = Batch(members(cells, tmp_path), checkpoint, compile=False)
    resumed.train(rest.append)
    assert rest == [2, 1, 1]
    for i in range(2):
        for name, p in whole.parameters(i).items():
            assert torch.equal(resumed.parameters(i)[name], p)


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
    study(out, PLAN, 2)
    return out


def _rows(path):
    return list(csv.DictReader(path.open()))


@trains
def test_a_study_leaves_a_row_for_every_model_and_condition_and_tables_and_plots(finished):
    rows, swept = _rows(finished / "results.csv"), _rows(finished / "sweep.csv")
    key = ("mixer", "learning_rate", "seed", "pairs", "length")
    of_models = [tuple(r[k] for k in key) for r in rows if r["task"] == "version" and r["learning_rate"]]
    assert len(of_models) == len(set(of_models)) == PLAN.seeds * 2
    rules = [r for r in rows if not r["learning_rate"]]
    assert len(rules) == PLAN.seeds * 2 * 2 and len(rows) == len(of_models) + len(rules) + PLAN.seeds
    assert len(swept) == 3 * (2 + 1)
    for row in (row for row in rows + swept if row["learning_rate"]):
        name = f"{row['task']}-{row['mixer']}-{row['learning_rate']}-{row['seed']}".replace(" ", "_").replace(",", "")
        result = json.loads((finished / "runs" / name / RESULT).read_text())
        (found,) = [
            x for x in result["results"] if (str(x.get("pairs", "")), str(x["length"])) == (row["pairs"], row["length"])
        ]
        assert float(row["accuracy"]) == pytest.approx(found["accuracy"], rel=1e-5)
        assert int(row["parameters"]) == result["parameters"] and result["cpu_seconds"] > 0
    for name in ("pairs.png", "lengths.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    tables = (finished / "results.md").read_text()
    assert "## parity" in tables and "| last mention | 0.0% (0% to 0%) | 0.0% (0% to 0%) |" in tables


def test_the_report_of_the_long_study_has_a_line_for_every_mixer_of_every_experiment(tmp_path):
    whole = plan("long", 2)
    cells = whole.final({(what.name, mixer): 1e-3 for what in whole.experiments for mixer in what.mixers})
    rows = [
        Row(what.name, cell.mixer, 1e-3, cell.seed, pairs, length, 0.5, 0.5, 1.0, 114_916, 6_400)
        for cell in cells for what in [cell.experiment]
        for pairs in what.task_fields.get("validation_pairs", [None])
        for length in what.task_fields["validation_lengths"]
    ]  # fmt: skip
    tables = write_report(tmp_path, cells, rows, rows, hours=2.5)
    sections = {section.split("\n")[0]: section for section in tables.split("\n## ")[1:]}
    assert sections.keys() == {what.name for what in whole.experiments}
    for what in whole.experiments:
        assert all(f"\n| {mixer} |" in sections[what.name] for mixer in what.mixers)
    assert tables.endswith("All trainings took 2.50 hours of CPU time of one core, compilation included.\n")
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.csv", "sweep.csv", "results.md", "pairs.png", "lengths.png"
    }  # fmt: skip


def _results(out):
    return {path: path.stat().st_mtime_ns for path in out.glob(f"runs/*/{RESULT}")}


@trains
def test_a_larger_study_goes_on_from_its_part_and_has_the_same_csv_as_at_once_with_another_number_of_jobs(
    finished, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "results.csv").unlink()
    (out / "plan.txt").write_text("\n".join(PART.parts()) + "\n")
    for folder in (path.parent for path in _results(out) if "parity" in path.parent.name):
        shutil.rmtree(folder)
    done = _results(out)
    study(out, PLAN, 1)
    for name in ("results.csv", "sweep.csv"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert len(done) == 3 + 2 and done.items() <= _results(out).items()


def test_what_a_killed_training_may_have_half_compiled_is_compiled_again_and_what_others_compiled_is_kept(tmp_path):
    cell, library = Cell(TINY, "GDN-2", 3e-3, 0), tmp_path / "compiled" / "ab" / "kernel.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"half")
    forget_half_compiled([[cell]], tmp_path)
    assert library.exists()
    (tmp_path / cell.name).mkdir()
    (tmp_path / cell.name / LOG).touch()
    forget_half_compiled([[cell]], tmp_path)
    assert not library.exists()


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
    process = _start(out, 2)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert (out / "results.csv").read_bytes() == (finished / "results.csv").read_bytes()


def test_a_folder_with_another_study_is_refused_before_anything_is_trained(tmp_path, capsys):
    (tmp_path / "plan.txt").write_text("\n".join(plan("standard").parts()) + "\n")
    for other in (["--quick"], ["--long", "--seeds", "6"]):
        assert main(["recall", "--out", str(tmp_path), *other]) == 1
        assert "which has another study" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@trains
def test_a_training_that_fails_is_named_and_the_others_are_done(tmp_path):
    broken, good = (
        Cell(dataclasses.replace(TRACK, task="no such task"), "GDN-2", 1e-3, 0),
        Cell(TRACK, "GDN-2", 1e-3, 0),
    )
    broken = dataclasses.replace(broken, mixer="softmax")  # in a batch of its own
    with pytest.raises(ConvertError, match=f"1 of 2 batches of trainings failed; {tmp_path / broken.name / LOG} says"):
        train_all([[broken], [good]], tmp_path, 1, compile=False)
    assert (tmp_path / good.name / RESULT).exists() and not (tmp_path / broken.name / RESULT).exists()
    assert "is not a known source" in (tmp_path / broken.name / LOG).read_text()


@pytest.mark.parametrize("option", ["--seeds", "--jobs"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_counts_below_one_are_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        main(["recall", "--out", "x", option, value])
    limits = "from 1 to 20" if option == "--seeds" else "of at least 1"
    assert f"is '{value}'; it must be a whole number {limits}" in capsys.readouterr().err
