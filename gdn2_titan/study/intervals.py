"""Differences between mixers, seed by seed, with 95% confidence intervals by Student's t."""

import math
import statistics
from collections.abc import Sequence

__all__ = ["MOST_SEEDS", "interval", "paired_difference"]

# Two-sided 95% quantiles of Student's t with 1, 2, ... degrees of freedom.
QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093,
)  # fmt: skip
MOST_SEEDS = len(QUANTILES) + 1


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% confidence interval (low, high) of 2 to MOST_SEEDS values; of a single one nothing is known: the
    interval is NaN."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, math.nan, math.nan
    half = QUANTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def paired_difference(ours: dict[int, float], others: dict[int, float]) -> tuple[float, float, float]:
    """``interval`` of ours - others over the seeds, {seed: value} each: models of one seed saw the same sequences."""
    return interval([value - others[seed] for seed, value in ours.items()])
