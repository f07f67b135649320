"""Which TorchTitan is installed: the generation of TOML files (0.2.2), or that of config functions (0.3.x)."""

import importlib.util

__all__ = ["HAS_TOML"]

# By what it has, not by its number: a fork may have none.
HAS_TOML = importlib.util.find_spec("torchtitan.config.job_config") is not None
