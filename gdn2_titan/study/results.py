"""What the trainings of the recall study measured, as rows, and what they say together, as tables in Markdown."""

import csv
import io
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from gdn2_titan.models.flops import state_bytes

from .cells import Cell, model_args
from .training import RESULT

__all__ = ["Row", "accuracy_table", "capacity", "capacity_table", "csv_text", "read_rows", "separation_table", "spread"]

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


def read_rows(cells: list[Cell], folders: list[Path]) -> list[Row]:
    """Rows of all cells, in the order of the grid. folders: where each cell was trained."""
    rows = []
    for cell, folder in zip(cells, folders, strict=True):
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        args = model_args(cell.model_fields)
        for result in found["results"]:
            rows.append(
                Row(
                    cell.experiment.task, cell.mixer, cell.seed, result.get("pairs"), result["length"],
                    result["accuracy"], result["exact"], result["loss"], found["parameters"],
                    state_bytes(args, result["length"]),
                )
            )  # fmt: skip
    return rows


def csv_text(rows: list[Row]) -> str:
    """The rows as CSV. Nothing in it depends on when or how fast it was trained."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.__annotations__), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in asdict(row).items()})
    return text.getvalue()


def spread(rows: list[Row]) -> tuple[float, float, float]:
    """(mean, smallest, largest) accuracy over the seeds."""
    values = [row.accuracy for row in rows]
    return statistics.fmean(values), min(values), max(values)


def capacity(accuracies: dict[int, float]) -> tuple[float, bool]:
    """How many pairs are held at an accuracy of 90%: between the numbers of pairs that were tested the accuracy is
    taken for linear. accuracies: {pairs: accuracy}.

    Returns:
        (pairs, whether more would be held than were tested); fewer than the smallest tested number counts as 0.
    """
    held = 0.0
    sizes = sorted(accuracies)
    for size, following in zip(sizes, [*sizes[1:], None], strict=True):
        if accuracies[size] < ENOUGH:
            return held, False
        held = float(size)
        if following is not None and accuracies[following] < ENOUGH:
            share = (accuracies[size] - ENOUGH) / (accuracies[size] - accuracies[following])
            return size + share * (following - size), False
    return held, True


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _cell(rows: list[Row]) -> str:
    """Mean and range over seeds, in percent."""
    mean, low, high = spread(rows)
    return f"{mean:.1%} ({low:.0%} to {high:.0%})"


def _mixers(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.mixer for row in rows))


def accuracy_table(rows: list[Row], axis: str) -> str:
    """Of one task, one line a mixer: accuracy at each value of ``axis`` ("pairs" or "length")."""
    values = sorted({getattr(row, axis) for row in rows})
    lines = [
        [mixer, *(_cell([r for r in rows if r.mixer == mixer and getattr(r, axis) == value]) for value in values)]
        for mixer in _mixers(rows)
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
    names, conditions = _mixers(rows), {(row.pairs, row.length) for row in rows}
    ranges = {
        (mixer, at): spread([row for row in rows if row.mixer == mixer and (row.pairs, row.length) == at])[1:]
        for mixer in names
        for at in conditions
    }

    def above(mixer: str, other: str) -> int:
        return sum(ranges[mixer, at][0] > ranges[other, at][1] for at in conditions)

    lines = [[mixer, *("" if mixer == x else str(above(mixer, x)) for x in names)] for mixer in names]
    return _table([f"of {len(conditions)}, above", *names], lines)
