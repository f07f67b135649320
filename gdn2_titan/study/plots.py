"""The pictures of the recall study."""

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import PercentFormatter, ScalarFormatter  # noqa: E402

from .results import spread  # noqa: E402

__all__ = ["plot_accuracy"]

STYLES = ("-", "--", "-.", ":")


def plot_accuracy(path, panels, axis, label):
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
