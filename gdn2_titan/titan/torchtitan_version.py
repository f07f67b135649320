"""Which generation of TorchTitan is installed: 0.2.2, which reads TOML files, or 0.3.x, which has config functions."""

import importlib.util

__all__ = ["IS_V02"]

# By what it has, not by its number: a fork may have none.
IS_V02: bool = importlib.util.find_spec("torchtitan.config.job_config") is not None
