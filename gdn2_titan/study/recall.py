"""``python -m gdn2_titan.study recall --out DIR``: trains a grid of small models on recall tasks, and reports."""

import argparse
import os
from operator import attrgetter
from pathlib import Path
from typing import Any

from gdn2_titan.convert.atomic import write_text
from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.model_options import number

from .intervals import MOST_SEEDS

__all__ = ["add_parser", "study"]

PLAN = "plan.txt"


def add_parser(subparsers: Any) -> None:
    """Adds the command; its options are in its --help."""
    parser = subparsers.add_parser("recall", help="train a grid of small models on recall tasks", description=__doc__)
    add, count = parser.add_argument, number(int, "a whole number of at least 1", lambda x: x >= 1)
    seeds = number(int, f"a whole number from 1 to {MOST_SEEDS}", lambda x: 1 <= x <= MOST_SEEDS)
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="for results, plots and trainings; an unfinished study goes on, and --long from the standard one",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two tasks, few steps and seeds: minutes, and no result")
    size.add_argument("--long", action="store_true", help="also more steps, parity and permutations: hours")
    add("--seeds", type=seeds, metavar="N", help="of each model with its best learning rate (default: 5; --quick: 2)")
    add("--jobs", type=count, metavar="N", help="batches of models at a time (default: one a core)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train what is not trained yet and write results.csv, sweep.csv, results.md and the plots.

    Raises:
        ConvertError: the folder has another study, or trainings failed.
    """
    from .cells import plan

    size = "quick" if options.quick else "long" if options.long else "standard"
    print(study(Path(options.out).absolute(), plan(size, options.seeds), options.jobs or len(os.sched_getaffinity(0))))


def study(out: Path, plan: Any, jobs: int) -> str:
    """Train a ``cells.Plan`` in the folder ``out``, ``jobs`` batches of models at a time. Returns the tables.

    Raises:
        ConvertError: see ``run``.
    """
    from .results import best_rates, cpu_hours, read_rows, write_report
    from .training import batches, train_all

    said, parts = out / PLAN, plan.parts()
    if said.exists() and not set(said.read_text(encoding="utf-8").splitlines()) <= set(parts):
        raise ConvertError(
            f"--out is {out}, which has another study ({said} says which); it must be a new folder, or one of a study "
            "that this one has as a part"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(said, "".join(f"{part}\n" for part in parts))
    runs, sweep = out / "runs", plan.sweep()
    train_all(batches(sweep, attrgetter("chosen_on")), runs, jobs, plan.compile)
    swept = read_rows(sweep, runs)
    rates = best_rates(swept, plan.experiments)
    final = plan.final(rates)
    train_all(batches(final, attrgetter("name")), runs, jobs, plan.compile)
    return write_report(out, final, swept, read_rows(final, runs), cpu_hours(sweep + final, runs))
