"""The files that a finished recall study leaves: CSV, tables in Markdown, plots."""

from gdn2_titan.convert.atomic import write_text

from .cells import RECALL_TASKS, TRACKING_TASKS
from .plots import plot_accuracy
from .results import csv_text, read_rows
from .tables import accuracy_table, capacity_table, separation_table

__all__ = ["write_report"]

CSV, TABLES, PAIRS_PLOT, LENGTH_PLOT = "results.csv", "results.md", "pairs.png", "lengths.png"


def write_report(out, cells, folders):
    """Writes the report of trained cells into the folder ``out``. Returns the tables, as Markdown."""
    rows = read_rows(cells, folders)
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
        plot_accuracy(out / PAIRS_PLOT, by_pairs, "pairs", "key-value pairs")
        plot_accuracy(out / LENGTH_PLOT, by_length, "length", "tokens")
    tables = "\n".join(parts)
    write_text(out / TABLES, tables)
    return tables
