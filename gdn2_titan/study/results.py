"""What the trainings of the recall study measured, as rows, and the files that say it: CSV, Markdown tables, plots."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from gdn2_titan.convert.atomic import write_text
from gdn2_titan.models.flops import state_bytes
from gdn2_titan.titan.tasks import TASKS, score_rules

from .cells import TRACKING_TASKS, Cell, Experiment, model_args
from .intervals import paired_difference
from .training import RESULT

__all__ = ["Row", "accuracy_table", "best_rates", "capacity", "capacity_table", "cpu_hours", "csv_text",
           "difference_table", "read_rows", "rule_rows", "write_report"]  # fmt: skip

CSV, SWEEP, TABLES, PAIRS_PLOT, LENGTH_PLOT = "results.csv", "sweep.csv", "results.md", "pairs.png", "lengths.png"
# Ten colours and three strokes: no two of thirty lines look alike.
COLOURS, STYLES = matplotlib.colormaps["tab10"].colors, ("-", "--", ":")
ENOUGH = 0.9


@dataclass(frozen=True)
class Row:
    """One model, or a rule that needs none, under one condition."""

    task: str
    mixer: str
    learning_rate: float | None
    seed: int
    pairs: int | None
    length: int
    accuracy: float
    exact: float
    loss: float | None
    parameters: int | None
    state_bytes: int | None


def read_rows(cells: list[Cell], runs: Path) -> list[Row]:
    """Rows of all cells, in the order of the grid. runs: where they were trained."""
    rows = []
    for cell in cells:
        found = json.loads((runs / cell.name / RESULT).read_text(encoding="utf-8"))
        args = model_args(cell.model_fields)
        rows += [
            Row(
                cell.experiment.name, cell.mixer, cell.learning_rate, cell.seed, result.get("pairs"), result["length"],
                result["accuracy"], result["exact"], result["loss"], found["parameters"],
                state_bytes(args, result["length"]),
            )
            for result in found["results"]
        ]  # fmt: skip
    return rows


def cpu_hours(cells: list[Cell], runs: Path) -> float:
    """CPU time that the trainings of these cells took, validation and compilation included."""
    found = (json.loads((runs / cell.name / RESULT).read_text(encoding="utf-8")) for cell in cells)
    return sum(of["cpu_seconds"] for of in found) / 3600


def rule_rows(rows: list[Row], cells: list[Cell]) -> list[Row]:
    """What the rules "first mention" and "last mention" score under each condition and seed of these rows, where the
    task has mentions. cells: those that the rows are of."""
    trained = {cell.experiment.name: cell.experiment for cell in cells}
    asked = dict.fromkeys((row.task, row.seed, row.pairs, row.length) for row in rows if row.pairs is not None)
    found = []
    for name, seed, pairs, length in asked:
        what = trained[name]
        own = {field: x for field, x in what.task_fields.items() if not field.startswith("validation_")}
        scores = score_rules(TASKS[what.task](**own | {"pairs": [pairs]}), length, seed, what.validated)
        for rule, score in scores.items():
            found.append(Row(name, rule, None, seed, pairs, length, *score.values(), None, None, None))
    return found


def best_rates(rows: list[Row], experiments: Sequence[Experiment]) -> dict[tuple[str, str], float]:
    """{(experiment, mixer): its learning rate}: the one of the best mean accuracy at the length trained at, over those
    that the experiment's rates are chosen on, each the mean over seeds and sizes; of equal ones the smallest."""
    lengths, found = {what.name: what.seq_len for what in experiments}, {}
    for what in experiments:
        for mixer in what.mixers:
            by_rate: dict[float, dict[str, list[float]]] = {}
            for row in rows:
                if row.mixer == mixer and row.task in what.chosen_on and row.length == lengths[row.task]:
                    by_rate.setdefault(row.learning_rate, {}).setdefault(row.task, []).append(row.accuracy)
            means = {rate: fmean(map(fmean, of_task.values())) for rate, of_task in by_rate.items()}
            found[what.name, mixer] = max(sorted(means), key=means.get)
    return found


def csv_text(rows: list[Row]) -> str:
    """The rows as CSV. Nothing in it depends on when or how fast it was trained."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.__annotations__), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in asdict(row).items()})
    return text.getvalue()


def _spreads(rows: list[Row], condition: Callable[[Row], Any]) -> dict[str, dict[Any, tuple[float, float, float]]]:
    """{mixer: {condition of the row: (mean, smallest, largest) accuracy over the seeds}}."""
    found = {}
    for row in rows:
        found.setdefault(row.mixer, {}).setdefault(condition(row), []).append(row.accuracy)
    return {mixer: {at: (fmean(x), min(x), max(x)) for at, x in values.items()} for mixer, values in found.items()}


def capacity(accuracies: dict[int, float]) -> tuple[float, bool]:
    """How many pairs are held at an accuracy of 90%: between the numbers of pairs that were tested the accuracy is
    taken for linear. accuracies: {pairs: accuracy}.

    Returns:
        (pairs, whether more would be held than were tested); fewer than the smallest tested number counts as 0.
    """
    held = None
    for size, accuracy in sorted(accuracies.items()):
        if accuracy < ENOUGH:
            if held is None:
                return 0.0, False
            share = (accuracies[held] - ENOUGH) / (accuracies[held] - accuracy)
            return held + share * (size - held), False
        held = size
    return float(held), True


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _mixers(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.mixer for row in rows))


def accuracy_table(rows: list[Row], axis: str) -> str:
    """Of one task, one line a mixer: accuracy at each value of ``axis`` ("pairs" or "length")."""
    values = sorted({getattr(row, axis) for row in rows})
    lines = [
        [mixer, *(f"{mean:.1%} ({low:.0%} to {high:.0%})" for mean, low, high in map(found.get, values))]
        for mixer, found in _spreads(rows, attrgetter(axis)).items()
    ]
    return _table(["mixer", *(f"{value} {'pairs' if axis == 'pairs' else 'tokens'}" for value in values)], lines)


def capacity_table(rows: list[Row]) -> str:
    """Of one task at one length: parameters, state and the pairs held at 90% accuracy, in all and per KB of state."""
    lines = []
    for mixer in _mixers(rows):
        mine = [row for row in rows if row.mixer == mixer]
        held, more = zip(
            *(capacity({r.pairs: r.accuracy for r in mine if r.seed == seed}) for seed in {r.seed for r in mine}),
            strict=True,
        )
        kilobytes = mine[0].state_bytes / 1000
        mean, least = sum(held) / len(held), "at least " if any(more) else ""
        pairs = f"{least}{mean:.1f} ({min(held):.1f} to {max(held):.1f})"
        lines.append([mixer, f"{mine[0].parameters:,}", f"{kilobytes:.2f}", pairs, f"{least}{mean / kilobytes:.2f}"])
    return _table(["mixer", "parameters", "state, KB", "pairs held at 90%", "pairs per KB"], lines)


def difference_table(rows: list[Row]) -> str:
    """Of one task at one length: mean accuracy of a line's mixer, over all sizes, minus that of a column's, in points,
    paired by seed, with its 95% confidence interval; bold where that leaves out zero."""
    by_size: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        by_size.setdefault(row.mixer, {}).setdefault(row.seed, []).append(row.accuracy)
    means = {mixer: {seed: fmean(x) for seed, x in seeds.items()} for mixer, seeds in by_size.items()}

    def said(mixer: str, other: str) -> str:
        if mixer == other:
            return ""
        mean, low, high = (100 * x for x in paired_difference(means[mixer], means[other]))
        text = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
        return f"**{text}**" if low > 0 or high < 0 else text

    return _table(["points, minus", *means], [[mixer, *(said(mixer, other) for other in means)] for mixer in means])


def rate_table(rows: list[Row]) -> str:
    """The learning rate of each mixer, on each task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    rates = {(row.task, row.mixer): f"{row.learning_rate:g}" for row in rows}
    return _table(["mixer", *tasks], [[mixer, *(rates.get((t, mixer), "") for t in tasks)] for mixer in _mixers(rows)])


def _plot_accuracy(path: Path, panels: dict[str, list[Row]], axis: str, label: str) -> None:
    """Accuracy against ``axis`` ("pairs" or "length"): a line for each mixer, with the seeds' spread around it.

    panels: {title: rows}, side by side.
    """
    figure = Figure((5.2 * len(panels), 4.2))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    mixers = _mixers([row for rows in panels.values() for row in rows])
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        for mixer, found in _spreads(rows, attrgetter(axis)).items():
            i, at = mixers.index(mixer), sorted(found)
            mean, low, high = np.transpose([found[x] for x in at])
            beside = [x * 2 ** (0.012 * (i - len(mixers) / 2)) for x in at]  # or the ranges would hide each other
            ax.errorbar(
                beside, mean, (mean - low, high - mean), fmt=STYLES[i % len(STYLES)], color=COLOURS[i % len(COLOURS)],
                label=mixer, marker="o", markersize=3.5, linewidth=1.2, elinewidth=0.8, capsize=2,
            )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.set_xticks(sorted({getattr(row, axis) for row in rows}))
        ax.minorticks_off()
        ax.set(title=title, xlabel=label, ylim=(-0.02, 1.02))
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("answers right (mean, and range over seeds)")
    axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=130, bbox_inches="tight")


def write_report(out: Path, cells: list[Cell], swept: list[Row], rows: list[Row], hours: float) -> str:
    """Writes the report of trained cells into the folder ``out``. Returns the tables, as Markdown.

    swept: rows of the trainings that chose the learning rates; rows: those of the cells; hours: of CPU time for all.
    """
    rules = rule_rows(rows, cells)
    write_text(out / SWEEP, csv_text(swept))
    write_text(out / CSV, csv_text(rows + rules))
    trained = {cell.experiment.name: cell.experiment for cell in cells}
    parts, by_pairs, by_length = [f"Learning rates, the best of the sweep:\n\n{rate_table(rows)}"], {}, {}
    for task in (name for name, what in trained.items() if what.task not in TRACKING_TASKS):
        mine, length = [row for row in rows if row.task == task], trained[task].seq_len
        asked = max(row.pairs for row in mine if row.length == max(r.length for r in mine))
        at_length = [row for row in mine if row.length == length]
        at_pairs = [row for row in mine if row.pairs == asked]
        ruled = [row for row in rules if row.task == task]
        by_size = accuracy_table(at_length + [row for row in ruled if row.length == length], "pairs")
        by_tokens = accuracy_table(at_pairs + [row for row in ruled if row.pairs == asked], "length")
        parts += [
            f"## {task}\n\nAccuracy on held-out sequences of {length} tokens (as in training), mean and range over "
            f"seeds:\n\n{by_size}",
            f"The same number of pairs, {asked}, in longer sequences:\n\n{by_tokens}",
            f"Pairs held at 90% accuracy in {length} tokens:\n\n{capacity_table(at_length)}",
            f"Differences in {length} tokens, in points of the mean over the numbers of pairs, paired by seed, with "
            "95% confidence intervals by Student's t (not corrected for their number):\n\n"
            + difference_table(at_length),
        ]
        by_pairs[f"{task}, {length} tokens"] = at_length
        by_length[f"{task}, {asked} pairs"] = at_pairs
    for task in (name for name, what in trained.items() if what.task in TRACKING_TASKS):
        parts.append(
            f"## {task}\n\nAccuracy of every answer, after training on sequences of {trained[task].seq_len} tokens:\n\n"
            + accuracy_table([row for row in rows if row.task == task], "length")
        )
    if by_pairs:
        _plot_accuracy(out / PAIRS_PLOT, by_pairs, "pairs", "key-value pairs")
        _plot_accuracy(out / LENGTH_PLOT, by_length, "length", "tokens")
    parts.append(f"All trainings took {hours:.2f} hours of CPU time of one core, compilation included.\n")
    tables = "\n".join(parts)
    write_text(out / TABLES, tables)
    return tables
