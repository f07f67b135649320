"""The way of a TOML file into a Trainer.Config of TorchTitan 0.3, from which on only that is read."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import tyro
from torchtitan.config import ConfigManager
from torchtitan.protocols.model_spec import ModelSpec

from gdn2_titan.convert.toml_table import read_toml
from gdn2_titan.models import flavors

from ..checkpoint import GDN2StateDictAdapter
from ..checks.command_line import (
    as_tyro_reads,
    check_arguments,
    check_table,
    config_file,
    torchtitan_reads_all_words,
)
from ..checks.ranges import check_range
from ..checks.settings import check_settings
from ..cpu import settle_device
from ..errors import ConfigError
from .activation_checkpoint import policy_of_fields
from .components import TitanModel, hook_converters, parallelize, pipeline
from .fields import COUNTERPARTS, WITHOUT, owner
from .trainer import GDN2Trainer, JobConfig, check

__all__ = ["JobConfig", "build", "parse", "trainer_config", "validate"]

settle_device()
torchtitan_reads_all_words()

# TorchTitan's rules of the command line: commas part the names of a list.
_RULES = tyro.constructors.ConstructorRegistry()
ConfigManager.register_tyro_rules(_RULES)


def trainer_config(job_config: Any) -> GDN2Trainer.Config:
    """The Trainer.Config that says what a JobConfig does.

    Raises:
        ConfigError: naming the field of which this cannot be said.
    """
    name, flavor = job_config.model.name, job_config.model.flavor
    if name != "gdn2":
        raise ConfigError(f"model.name is {name!r}; it must be 'gdn2'")
    if flavor not in flavors:
        raise ConfigError(f"model.flavor is {flavor!r}; it must be one of {', '.join(flavors)}")
    check_range("activation_checkpoint.selective_ac_option", job_config.activation_checkpoint.selective_ac_option)
    config = GDN2Trainer.Config(model_spec=model_spec(flavor))
    for place, counterpart in COUNTERPARTS.items():
        setattr(*owner(config, counterpart), getattr(*owner(job_config, place)))
    config.activation_checkpoint = policy_of_fields(job_config.activation_checkpoint)
    return config


def model_spec(flavor: str) -> ModelSpec:
    """TorchTitan's ModelSpec of a flavor."""
    return ModelSpec(
        name="gdn2", flavor=flavor, model=TitanModel.Config(args=replace(flavors[flavor])),
        parallelize_fn=parallelize, pipelining_fn=pipeline, post_optimizer_build_fn=hook_converters,
        state_dict_adapter=lambda config, folder: GDN2StateDictAdapter(config.args, folder),
    )  # fmt: skip


def parse(arguments: Sequence[str]) -> Any:
    """The job config of a command line: ``--job.config_file`` and changes to it, as TorchTitan 0.2.2 reads them.

    Raises:
        ConfigError: if the file or a change does not fit.
    """
    path = config_file(arguments)
    job_config = _of_table({} if path is None else _read(path), JobConfig)
    check_arguments(arguments, JobConfig)
    return tyro.cli(JobConfig, args=as_tyro_reads(arguments, JobConfig), default=job_config, registry=_RULES)


def build(job_config: Any) -> GDN2Trainer:
    """The trainer of a parsed job config, in an initialised environment of torchrun."""
    return trainer_config(job_config).build()


def validate(job_config: Any) -> None:
    """Raise ConfigError for the first thing wrong with a parsed job config."""
    check(trainer_config(job_config))
    check_settings(job_config)


def _read(path: str) -> dict[str, Any]:
    table = read_toml(path)
    for place, default in WITHOUT.items():
        *sections, name = place.split(".")
        branch = table
        for section in sections:
            branch = branch.get(section, {}) if isinstance(branch, dict) else {}
        if isinstance(branch, dict) and name in branch and (value := branch.pop(name)) != default:
            raise ConfigError(
                f"{place} in {path} is {value!r}; it must be left out, or {default!r}: TorchTitan 0.3 has no such"
            )
    # A section that only had such fields is empty now.
    table = {name: value for name, value in table.items() if value or name in {f.name for f in fields(JobConfig)}}
    check_table(table, JobConfig)
    return table


def _of_table(table: dict[str, Any], cls: type) -> Any:
    types = {f.name: f.type for f in fields(cls)}
    return cls(
        **{name: _of_table(value, types[name]) if is_dataclass(types[name]) else value for name, value in table.items()}
    )
