"""The job config of a TOML file under TorchTitan 0.3, and the way from it to a Trainer.Config and back.

The rest of this package reads the former, whichever way a training was started.
"""

import dataclasses
import functools
import typing
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass

import tyro
from torchtitan.config import ConfigManager
from torchtitan.protocols.model_spec import ModelSpec

from gdn2_titan.models import flavors

from ..arguments_check import check_arguments
from ..cpu import settle_device
from ..errors import ConfigError
from ..setting_ranges import check_range
from ..state_dict_adapter import GDN2StateDictAdapter
from ..toml_check import check_table, config_file, read_toml
from ..validate_config import validate_config
from .activation_checkpoint import fields_of_policy, policy_of_fields
from .counterparts import COUNTERPARTS, WITHOUT
from .model import TitanModel
from .parallelize import hook_converters, parallelize
from .pipeline import pipeline
from .trainer import GDN2Trainer, check

__all__ = ["JobConfig", "build", "job_config_of", "parse", "trainer_config", "validate"]

settle_device()

# TorchTitan's rules of the command line: commas part the names of a list.
_RULES = tyro.constructors.ConstructorRegistry()
ConfigManager.register_tyro_rules(_RULES)


@dataclass
class Job:
    config_file: str | None = None
    description: str = "default job"
    custom_config_module: str = ""


@dataclass
class Model:
    name: str = "gdn2"
    flavor: str = "debug"


@dataclass
class ActivationCheckpoint:
    mode: typing.Literal["selective", "full", "memory_budget", "none"] = "selective"
    selective_ac_option: str = "2"
    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = field(default_factory=lambda: ["moe.router.gate"])
    memory_budget: float = 0.5
    visualize_memory_budget_pareto: bool = False
    preserve_rng_state: bool = True
    determinism_check: str = "default"
    debug: bool = False


def _get(config, place):
    return functools.reduce(getattr, place.split("."), config)


def _type(config, place):
    *parents, name = place.split(".")
    return typing.get_type_hints(type(_get(config, ".".join(parents)) if parents else config))[name]


def _section(name, tree, base=()):
    """A dataclass of the branches and leaves (type, default) of a tree of dictionaries."""
    made = []
    for key, value in tree.items():
        if isinstance(value, dict):
            value = _section(key, value, {"job": (Job,), "model": (Model,)}.get(key, ()))
            made.append((key, value, field(default_factory=value)))
        elif is_dataclass(value[1]) or isinstance(value[1], list):
            made.append((key, value[0], field(default_factory=functools.partial(_copy, value[1]))))
        else:
            made.append((key, *value))
    return make_dataclass(name, [m if len(m) == 2 else (m[0], m[1], _as_field(m[2])) for m in made], bases=base)


def _as_field(default):
    return default if isinstance(default, dataclasses.Field) else field(default=default)


def _copy(value):
    return dataclasses.replace(value) if is_dataclass(value) else list(value)


def _job_config_class():
    defaults, tree = GDN2Trainer.Config(), {}
    for place, counterpart in COUNTERPARTS.items():
        *sections, name = place.split(".")
        branch = functools.reduce(lambda tree, section: tree.setdefault(section, {}), sections, tree)
        branch[name] = (_type(defaults, counterpart), _get(defaults, counterpart))
    tree["activation_checkpoint"] = (ActivationCheckpoint, ActivationCheckpoint())
    return _section("JobConfig", tree, (_ToDict,))


class _ToDict:
    def to_dict(self):
        return dataclasses.asdict(self)


JobConfig = _job_config_class()


def job_config_of(config):
    """The JobConfig that says what a Trainer.Config does."""
    job_config = JobConfig()
    job_config.model.flavor = config.model_spec.flavor
    for name, value in fields_of_policy(config.activation_checkpoint).items():
        setattr(job_config.activation_checkpoint, name, value)
    for place, counterpart in COUNTERPARTS.items():
        _set(job_config, place, _get(config, counterpart))
    return job_config


def trainer_config(job_config):
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
        _set(config, counterpart, _get(job_config, place))
    config.activation_checkpoint = policy_of_fields(job_config.activation_checkpoint)
    return config


def _set(config, place, value):
    *parents, name = place.split(".")
    setattr(_get(config, ".".join(parents)) if parents else config, name, value)


def model_spec(flavor):
    """TorchTitan's ModelSpec of a flavor."""
    return ModelSpec(
        name="gdn2",
        flavor=flavor,
        model=TitanModel.Config(args=dataclasses.replace(flavors[flavor])),
        parallelize_fn=parallelize,
        pipelining_fn=pipeline,
        post_optimizer_build_fn=hook_converters,
        state_dict_adapter=lambda config, folder: GDN2StateDictAdapter(config.args, folder),
    )


def parse(arguments):
    """The JobConfig of a command line: ``--job.config_file`` and changes to it, as TorchTitan 0.2.2 reads them.

    Raises:
        ConfigError: if the file or a change does not fit.
    """
    path = config_file(arguments)
    job_config = _of_table({} if path is None else _read(path), JobConfig)
    check_arguments(arguments, JobConfig)
    return tyro.cli(JobConfig, args=arguments, default=job_config, registry=_RULES)


def build(job_config):
    """The trainer of a parsed job config, in an initialised environment of torchrun."""
    return trainer_config(job_config).build()


def validate(job_config):
    """Raise ConfigError for the first thing wrong with a parsed job config."""
    check(trainer_config(job_config))
    validate_config(job_config)


def _read(path):
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


def _of_table(table, cls):
    types = {f.name: f.type for f in fields(cls)}
    return cls(
        **{name: _of_table(value, types[name]) if is_dataclass(types[name]) else value for name, value in table.items()}
    )
