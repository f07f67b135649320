"""``python -m gdn2_titan.titan.train --job.config_file X.toml [overrides]``: trains on either generation of TorchTitan.

Alone it is one process; with torchrun, one of many. Overrides are named as in the TOML file.
"""

import os
import sys

from .errors import refusing
from .generation import HAS_TOML

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


@refusing
def _config_function():
    """Hands what the command line says to TorchTitan 0.3 as a config function of ours."""
    from . import config_registry
    from .v03.job_config import parse, trainer_config

    job_config = parse(sys.argv[1:])
    config_registry.from_command_line = lambda: trainer_config(job_config)
    sys.argv[1:] = ["--module", "gdn2_titan.titan", "--config", "from_command_line"]


def main():
    if "RANK" not in os.environ:
        os.environ.update(ALONE)
    if not HAS_TOML:
        _config_function()
    elif not any(argument.startswith("--job.custom_config_module") for argument in sys.argv):
        sys.argv.append("--job.custom_config_module=gdn2_titan.titan.job_config")
    from torchtitan import train

    train.main(train.Trainer) if HAS_TOML else train.main()


if __name__ == "__main__":
    main()
