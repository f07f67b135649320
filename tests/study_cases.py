"""A study of recall so small that its trainings take seconds. ``python -m tests.study_cases OUT JOBS`` runs it in a
process that can be killed."""

import sys
from pathlib import Path

from gdn2_titan.study.cells import Cell, Experiment
from gdn2_titan.study.results import write_report
from gdn2_titan.study.training import train_all

__all__ = ["CELLS", "study"]

TINY = Experiment(
    "mqar", ("GDN-2", "softmax"), {"pairs": [2, 4], "keys": 16, "values": 16, "validation_lengths": [16, 32]},
    steps=8, seq_len=16, batch=4, learning_rate=4e-3,
)  # fmt: skip
TRACK = Experiment(
    "parity", ("GDN-2, erase up to 2",), {"validation_lengths": [16, 32]},
    steps=4, seq_len=16, batch=4, learning_rate=4e-3,
)  # fmt: skip
CELLS = [Cell(what, mixer, 0) for what in (TINY, TRACK) for mixer in what.mixers]


def study(out, jobs):
    """Trains what is not trained yet and writes the report, as the command does with its own grid."""
    folders = [out / "runs" / cell.name for cell in CELLS]
    train_all({folder: cell.toml(folder) for folder, cell in zip(folders, CELLS, strict=True)}, jobs)
    return write_report(out, CELLS, folders)


if __name__ == "__main__":
    study(Path(sys.argv[1]), int(sys.argv[2]))
