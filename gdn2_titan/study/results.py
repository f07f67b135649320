"""What the trainings of a study measured, as rows, and what they say together."""

import csv
import io
import json
import statistics
from dataclasses import asdict, dataclass

from gdn2_titan.models.state_size import state_bytes

from .mixers import model_args
from .train_cell import RESULT

__all__ = ["Row", "capacity", "csv_text", "read_rows", "spread"]

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


def read_rows(cells, folders):
    """Rows of all cells, in the order of the grid. folders: where each cell was trained."""
    rows = []
    for cell, folder in zip(cells, folders, strict=True):
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        args = model_args(cell.model_fields)
        for result in found["results"]:
            rows.append(
                Row(
                    cell.experiment.task,
                    cell.mixer,
                    cell.seed,
                    result.get("pairs"),
                    result["length"],
                    result["accuracy"],
                    result["exact"],
                    result["loss"],
                    found["parameters"],
                    state_bytes(args, result["length"]),
                )
            )
    return rows


def csv_text(rows):
    """The rows as CSV. Nothing in it depends on when or how fast it was trained."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.__annotations__), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in asdict(row).items()})
    return text.getvalue()


def spread(rows):
    """(mean, smallest, largest) accuracy over the seeds."""
    values = [row.accuracy for row in rows]
    return statistics.fmean(values), min(values), max(values)


def capacity(accuracies):
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
