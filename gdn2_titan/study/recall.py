"""``python -m gdn2_titan.study recall --out DIR``: trains a grid of small models on recall tasks, and reports."""

import argparse
import os
from pathlib import Path
from typing import Any

from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.model_options import number

__all__ = ["add_parser"]


def add_parser(subparsers: Any) -> None:
    """Adds the command; its options are in its --help."""
    parser = subparsers.add_parser("recall", help="train a grid of small models on recall tasks", description=__doc__)
    add, count = parser.add_argument, number(int, "a whole number of at least 1", lambda x: x >= 1)
    add("--out", required=True, metavar="DIR", help="for results, plots and trainings; an unfinished study goes on")
    add("--quick", action="store_true", help="one seed, fewer steps: minutes instead of an hour and more")
    add("--seeds", type=count, metavar="N", help="of each model (default: 3; with --quick 1)")
    add("--jobs", type=count, metavar="N", help="trainings at a time (default: one a core)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train what is not trained yet and write results.csv, results.md and the plots.

    Raises:
        ConvertError: the folder has another study, or trainings failed.
    """
    from .cells import grid
    from .results import write_report
    from .training import CONFIG, train_all

    out = Path(options.out).absolute()
    cells = grid(options.quick, options.seeds)
    folders = {out / "runs" / cell.name: cell for cell in cells}
    texts = {folder: cell.toml(folder) for folder, cell in folders.items()}
    for folder, text in texts.items():
        config = folder / CONFIG
        if config.exists() and config.read_text(encoding="utf-8") != text:
            raise ConvertError(f"--out is {out}, which has another study ({config} differs); it must be a new folder")
    train_all(texts, options.jobs or len(os.sched_getaffinity(0)))
    print(write_report(out, cells, list(folders)))
