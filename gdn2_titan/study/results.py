"""What the trainings of the recall study measured, as rows, and the files that say it: CSV, Markdown tables, plots."""

import csv
import io
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from gdn2_titan.convert.atomic import write_text
from gdn2_titan.models.flops import state_bytes

from .cells import RECALL_TASKS, TRACKING_TASKS, Cell, model_args
from .training import RESULT

__all__ = ["Row", "accuracy_table", "capacity", "capacity_table", "csv_text", "separation_table", "write_report"]

CSV, TABLES, PAIRS_PLOT, LENGTH_PLOT = "results.csv", "results.md", "pairs.png", "lengths.png"
STYLES = ("-", "--", "-.", ":")
ENOUGH = 0.9


@dataclass(frozen=True)
class Row:
    """One model under one condition."""

    task: str
    mixer: str
    seed: int
    pairs: int | None
    length: int
    accuracy: float
    exact: float
    loss: float
    parameters: int
    state_bytes: int


def _read_rows(cells: list[Cell], folders: list[Path]) -> list[Row]:
    """Rows of all cells, in the order of the grid. folders: where each cell was trained."""
    rows = []
    for cell, folder in zip(cells, folders, strict=True):
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        args = model_args(cell.model_fields)
        rows += [
            Row(
                cell.experiment.task, cell.mixer, cell.seed, result.get("pairs"), result["length"], result["accuracy"],
                result["exact"], result["loss"], found["parameters"], state_bytes(args, result["length"]),
            )
            for result in found["results"]
        ]  # fmt: skip
    return rows


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
    return {
        mixer: {at: (statistics.fmean(x), min(x), max(x)) for at, x in values.items()}
        for mixer, values in found.items()
    }


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


def separation_table(rows: list[Row]) -> str:
    """Of one task: under how many of its conditions every seed of a line's mixer is above every seed of a column's."""
    found = _spreads(rows, attrgetter("pairs", "length"))

    def above(mixer: str, other: str) -> int:
        return sum(lowest > found[other][at][2] for at, (_, lowest, _) in found[mixer].items())

    lines = [[mixer, *("" if mixer == x else str(above(mixer, x)) for x in found)] for mixer in found]
    return _table([f"of {len({(row.pairs, row.length) for row in rows})}, above", *found], lines)


def _plot_accuracy(path: Path, panels: dict[str, list[Row]], axis: str, label: str) -> None:
    """Accuracy against ``axis`` ("pairs" or "length"): a line for each mixer, with the seeds' spread around it.

    panels: {title: rows}, side by side.
    """
    figure = Figure((5.2 * len(panels), 4.2))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    mixers = _mixers([row for rows in panels.values() for row in rows])
    colours = matplotlib.colormaps["tab10"].colors
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        for mixer, found in _spreads(rows, attrgetter(axis)).items():
            i, at = mixers.index(mixer), sorted(found)
            mean, low, high = np.transpose([found[x] for x in at])
            beside = [x * 2 ** (0.012 * (i - len(mixers) / 2)) for x in at]  # or the ranges would hide each other
            ax.errorbar(
                beside, mean, (mean - low, high - mean), fmt=STYLES[i % len(STYLES)], color=colours[i], label=mixer,
                marker="o", markersize=3.5, linewidth=1.2, elinewidth=0.8, capsize=2,
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


def write_report(out: Path, cells: list[Cell], folders: list[Path]) -> str:
    """Writes the report of trained cells into the folder ``out``. Returns the tables, as Markdown."""
    rows = _read_rows(cells, folders)
    write_text(out / CSV, csv_text(rows))
    trained = {cell.experiment.task: cell.experiment for cell in cells}
    parts, by_pairs, by_length = [], {}, {}
    for task in (task for task in RECALL_TASKS if task in trained):
        mine, length = [row for row in rows if row.task == task], trained[task].seq_len
        asked = max(row.pairs for row in mine if row.length == max(r.length for r in mine))
        at_length = [row for row in mine if row.length == length]
        at_pairs = [row for row in mine if row.pairs == asked]
        parts += [
            f"## {task}\n\nAccuracy on held-out sequences of {length} tokens (as in training), mean and range over "
            f"seeds:\n\n{accuracy_table(at_length, 'pairs')}",
            f"The same number of pairs, {asked}, in longer sequences:\n\n{accuracy_table(at_pairs, 'length')}",
            f"Pairs held at 90% accuracy in {length} tokens:\n\n{capacity_table(at_length)}",
            "Beyond the seeds' spread: in how many conditions (pairs, length) all seeds of the mixer on the left are "
            f"above all of the other:\n\n{separation_table(mine)}",
        ]
        by_pairs[f"{task}, {length} tokens"] = at_length
        by_length[f"{task}, {asked} pairs"] = at_pairs
    for task in (task for task in TRACKING_TASKS if task in trained):
        parts.append(
            f"## {task}\n\nAccuracy of every answer, after training on sequences of {trained[task].seq_len} tokens:\n\n"
            + accuracy_table([row for row in rows if row.task == task], "length")
        )
    if by_pairs:
        _plot_accuracy(out / PAIRS_PLOT, by_pairs, "pairs", "key-value pairs")
        _plot_accuracy(out / LENGTH_PLOT, by_length, "length", "tokens")
    tables = "\n".join(parts)
    write_text(out / TABLES, tables)
    return tables
