"""The config functions of TorchTitan 0.3.x: ``-m torchtitan.train --module gdn2_titan.titan --config gdn2_debug``.

Each says what a TOML file in train_configs/ says; 370M, 370M_hybrid and 400M are the 150M's with another flavor.
``from_toml`` says what any TOML file does, whose path is in the environment variable GDN2_TOML.
"""

import functools
import os
from pathlib import Path

from .errors import ConfigError, refusing
from .v03.config import parse, trainer_config
from .v03.trainer import GDN2Trainer

__all__ = [
    "from_toml", "gdn2_150M", "gdn2_1_3B", "gdn2_1_3B_hybrid", "gdn2_370M", "gdn2_370M_hybrid", "gdn2_400M",
    "gdn2_debug", "gdn2_debug_hybrid", "gdn2_paper_1_3B", "gdn2_paper_1_3B_hybrid", "gdn2_paper_370M", "gdn2_recall",
]  # fmt: skip

# A link to the folder at the root of the repository, and a folder where the package is installed.
TRAIN_CONFIGS = Path(__file__).parent / "train_configs"


def _of(path: str | Path, *changes: str) -> GDN2Trainer.Config:
    return trainer_config(parse([f"--job.config_file={path}", *changes]))


@refusing
def from_toml() -> GDN2Trainer.Config:
    if "GDN2_TOML" not in os.environ:
        raise ConfigError("GDN2_TOML is not set; with --config from_toml it must be the path of a TOML file")
    return _of(os.environ["GDN2_TOML"])


# A few minutes on a CPU: the source text of Python's standard library, byte by byte.
gdn2_debug = functools.partial(_of, TRAIN_CONFIGS / "debug.toml")
gdn2_debug_hybrid = functools.partial(_of, TRAIN_CONFIGS / "debug_hybrid.toml")
# Multi-query associative recall; the other tasks' files are beside its own.
gdn2_recall = functools.partial(_of, TRAIN_CONFIGS / "recall" / "mqar.toml")
# On eight GPUs, with a tokenizer in ./assets/tokenizer: 0.5M tokens a batch.
gdn2_150M = functools.partial(_of, TRAIN_CONFIGS / "150M.toml")
gdn2_370M = functools.partial(
    gdn2_150M, "--model.flavor=370M", "--job.dump_folder=./outputs/370M", "--training.local_batch_size=8"
)
gdn2_370M_hybrid = functools.partial(
    gdn2_150M, "--model.flavor=370M_hybrid", "--job.dump_folder=./outputs/370M_hybrid", "--training.local_batch_size=8"
)
gdn2_400M = functools.partial(
    gdn2_150M, "--model.flavor=400M", "--job.dump_folder=./outputs/400M", "--training.local_batch_size=8"
)
gdn2_1_3B = functools.partial(_of, TRAIN_CONFIGS / "1.3B.toml")
gdn2_1_3B_hybrid = functools.partial(_of, TRAIN_CONFIGS / "1.3B_hybrid.toml")
# The same by the recipe of paper and release.
gdn2_paper_370M = functools.partial(_of, TRAIN_CONFIGS / "paper" / "370M.toml")
gdn2_paper_1_3B = functools.partial(_of, TRAIN_CONFIGS / "paper" / "1.3B.toml")
gdn2_paper_1_3B_hybrid = functools.partial(_of, TRAIN_CONFIGS / "paper" / "1.3B_hybrid.toml")
