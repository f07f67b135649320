"""The check of a whole job config as soon as TorchTitan 0.2.2 has parsed it, before it builds anything."""

import functools

from torchtitan.config import ConfigManager
from torchtitan.protocols import train_spec

from gdn2_titan.models import GDN2Model

from ..errors import refusing
from ..validate_config import validate_config

__all__ = ["UncheckedConfigManager", "check_parsed_configs"]

STOCK = ConfigManager._validate_config


class UncheckedConfigManager(ConfigManager):
    """Parses for someone who checks for himself."""

    _validate_config = STOCK


def _is_ours(job_config):
    """Whether this package's model is asked for, or one that nobody knows or will register."""
    try:
        return issubclass(train_spec.get_train_spec(job_config.model.name).model_cls, GDN2Model)
    except ValueError:
        return not job_config.experimental.custom_import


def check_parsed_configs():
    """Let a launch end with our sentence where its config cannot train. Once per process; again is harmless."""

    @functools.wraps(STOCK)
    def check(manager):
        if _is_ours(manager.config):
            refusing(validate_config)(manager.config)
        STOCK(manager)

    ConfigManager._validate_config = check
