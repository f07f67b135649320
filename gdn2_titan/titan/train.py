"""``python -m gdn2_titan.titan.train --job.config_file X.toml [overrides]``: trains on either generation of TorchTitan.

Alone it is one process; with torchrun, one of many. Overrides are named as in the TOML file.
"""

import os
import sys

from gdn2_titan.convert.toml_table import read_toml

from .checks.command_line import config_file, options_of
from .errors import refusing
from .torchtitan_version import IS_V02

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


@refusing
def _custom_config_module() -> None:
    """Names our sections to TorchTitan 0.2.2, where neither the command line nor the file names a module."""
    from torchtitan.config import ConfigManager

    path = config_file(sys.argv)
    job = {} if path is None else read_toml(path).get("job", {})
    named = isinstance(job, dict) and job.get("custom_config_module")
    if not named and "job.custom_config_module" not in dict(options_of(sys.argv)):
        sys.argv.append("--job.custom_config_module=gdn2_titan.titan.job_config")
        # TorchTitan took the arguments when it was imported, which is before.
        ConfigManager.parse_args.__defaults__ = (sys.argv[1:],)


@refusing
def _config_function() -> None:
    """Hands what the command line says to TorchTitan 0.3 as a config function of ours."""
    from . import config_registry
    from .v03.config import parse, trainer_config, validate

    job_config = parse(sys.argv[1:])
    validate(job_config)
    config_registry.from_command_line = lambda: trainer_config(job_config)
    sys.argv[1:] = ["--module", "gdn2_titan.titan", "--config", "from_command_line"]


def main() -> None:
    if "RANK" not in os.environ:
        os.environ.update(ALONE)
    try:
        _custom_config_module() if IS_V02 else _config_function()
        from torchtitan import train

        train.main(train.Trainer) if IS_V02 else train.main()
    except SystemExit as end:  # as the command that only checks a config ends where it cannot train
        if not isinstance(end.code, str):
            raise
        print(end.code, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
