"""The files that a finished recall study leaves: CSV, tables in Markdown, plots."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import PercentFormatter, ScalarFormatter  # noqa: E402

from gdn2_titan.convert.atomic import write_text  # noqa: E402

from .cells import RECALL_TASKS, TRACKING_TASKS, Cell  # noqa: E402
from .results import (  # noqa: E402
    Row,
    accuracy_table,
    capacity_table,
    csv_text,
    read_rows,
    separation_table,
    spread,
)  # fmt: skip

__all__ = ["write_report"]

CSV, TABLES, PAIRS_PLOT, LENGTH_PLOT = "results.csv", "results.md", "pairs.png", "lengths.png"
STYLES = ("-", "--", "-.", ":")


def plot_accuracy(path: Path, panels: dict[str, list[Row]], axis: str, label: str) -> None:
    """Accuracy against ``axis`` ("pairs" or "length"): a line for each mixer, with the seeds' spread around it.

    panels: {title: rows}, side by side.
    """
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), sharey=True, squeeze=False)
    mixers = list(dict.fromkeys(row.mixer for rows in panels.values() for row in rows))
    colours = pyplot.get_cmap("tab10").colors
    for ax, (title, rows) in zip(axes[0], panels.items(), strict=True):
        for i, mixer in enumerate(mixers):
            mine = [row for row in rows if row.mixer == mixer]
            at = sorted({getattr(row, axis) for row in mine})
            if not at:
                continue
            found = [spread([row for row in mine if getattr(row, axis) == x]) for x in at]
            mean, low, high = zip(*found, strict=True)
            ends = [[y - x for x, y in zip(low, mean, strict=True)], [y - x for x, y in zip(mean, high, strict=True)]]
            beside = [x * 2 ** (0.012 * (i - len(mixers) / 2)) for x in at]  # or the ranges would hide each other
            ax.errorbar(
                beside, mean, ends, fmt=STYLES[i % len(STYLES)], color=colours[i], marker="o", markersize=3.5,
                linewidth=1.2, elinewidth=0.8, capsize=2, label=mixer,
            )  # fmt: skip
        ax.set_title(title)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.set_xticks(sorted({getattr(row, axis) for row in rows}))
        ax.minorticks_off()
        ax.set_xlabel(label)
        ax.set_ylim(-0.02, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("answers right (mean, and range over seeds)")
    axes[0][-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def write_report(out: Path, cells: list[Cell], folders: list[Path]) -> str:
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
