"""What is known of a checkpoint's model: from ``gdn2.json`` in the folder of a run's checkpoints or in a checkpoint
itself, from a TorchTitan TOML file, or by the name of a flavor."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdn2_titan.models import GDN2ModelArgs, flavors
from gdn2_titan.models.flavors import ModelOverrides, model_args_of

from .atomic import write_text
from .errors import ConvertError, read_json, reading
from .toml_table import ConfigError, check_table, read_toml

__all__ = ["BYTE_TOKENIZER", "INFO_FILE", "CheckpointInfo", "args_from_fields", "args_to_fields", "chosen_info",
           "find_info", "write_info"]  # fmt: skip

INFO_FILE = "gdn2.json"
BYTE_TOKENIZER = Path(__file__).parents[1] / "titan" / "assets" / "byte_tokenizer"


@dataclass(frozen=True)
class CheckpointInfo:
    """model_args: of the model. job_config: what the training was told, as a dict, or None where nothing is known."""

    model_args: GDN2ModelArgs
    job_config: dict[str, Any] | None = None


def args_to_fields(args: GDN2ModelArgs) -> dict[str, Any]:
    """Plain JSON values of every field of GDN2ModelArgs."""
    return dataclasses.asdict(args) | {"layer_pattern": list(args.layer_pattern)}


def args_from_fields(fields: Mapping[str, Any], path: str | os.PathLike[str]) -> GDN2ModelArgs:
    """GDN2ModelArgs of a dict; fields that are not there keep their default, and others are left alone.

    Raises:
        ConvertError: naming ``path`` and the field that no model can be built from.
    """
    known = {field.name for field in dataclasses.fields(GDN2ModelArgs)}
    fields = {name: value for name, value in fields.items() if name in known}
    if isinstance(fields.get("layer_pattern"), list):
        fields["layer_pattern"] = tuple(fields["layer_pattern"])
    for name, value in fields.items():
        if isinstance(getattr(GDN2ModelArgs, name), bool) and not isinstance(value, bool):
            raise ConvertError(f"{path} has {name} {value!r}; it must be true or false")
    args = GDN2ModelArgs(**fields)
    try:
        args.validate()
    except (ValueError, TypeError) as error:
        raise ConvertError(f"{path} describes no model that can be built: {error}") from error
    return args


def write_info(folder: str | os.PathLike[str], info: CheckpointInfo) -> None:
    """Writes ``gdn2.json``, whole or not at all."""
    content = {"model_args": args_to_fields(info.model_args), "job_config": info.job_config}
    # A job config may hold paths and other values that JSON has no word for.
    write_text(Path(folder) / INFO_FILE, json.dumps(content, indent=2, default=str) + "\n")


def find_info(checkpoint: str | os.PathLike[str]) -> CheckpointInfo | None:
    """What ``gdn2.json`` in a checkpoint's folder or in the one around it says, or None."""
    checkpoint = Path(checkpoint).absolute()
    for path in (checkpoint / INFO_FILE, checkpoint.parent / INFO_FILE):
        if path.is_file():
            content = read_json(path)
            with reading(path):
                return CheckpointInfo(args_from_fields(content["model_args"], path), content.get("job_config"))
    return None


def chosen_info(config: str | os.PathLike[str] | None, flavor: str | None) -> CheckpointInfo | None:
    """What the options --config and --flavor name, or None.

    Raises:
        ConvertError: both are given, or what they name is not there.
    """
    if config is not None and flavor is not None:
        raise ConvertError("--config and --flavor are both given; it must be one of them")
    if config is not None:
        return _info_of_toml(str(config))
    if flavor is not None and flavor not in flavors:
        raise ConvertError(f"--flavor is {flavor!r}; it must be one of {', '.join(flavors)}")
    return None if flavor is None else CheckpointInfo(flavors[flavor])


@dataclass
class _Model:
    """[model], with the defaults of ``gdn2_titan.titan.job_config``."""

    name: str = "gdn2"
    flavor: str = "debug"
    hf_assets_path: str = str(BYTE_TOKENIZER)
    tokenizer_path: str | None = None
    converters: list[str] = dataclasses.field(default_factory=list)
    print_after_conversion: bool = False


@dataclass
class _GDN2(ModelOverrides):
    """[gdn2], also with what is about training alone."""

    document_resets: bool = True
    statistics_freq: int = 50


@dataclass
class _Sections:
    model: _Model
    gdn2: _GDN2


def _info_of_toml(path: str) -> CheckpointInfo:
    """Of the model that TorchTitan would build from the file. Sections that say nothing of it are not looked at."""
    try:
        table = read_toml(path)
        said = {name: table[name] for name in ("model", "gdn2") if name in table}
        check_table(said, _Sections)
    except ConfigError as error:
        raise ConvertError(f"--config: {error}") from error
    model, overrides = _Model(**said.get("model", {})), _GDN2(**said.get("gdn2", {}))
    if model.name != "gdn2" or model.flavor not in flavors:
        raise ConvertError(
            f"--config is {path}, with model {model.name!r} of flavor {model.flavor!r}; it must "
            f"be 'gdn2' of flavor {', '.join(flavors)}"
        )
    job_config = table | {"model": dataclasses.asdict(model)}
    return CheckpointInfo(model_args_of(model.flavor, overrides), job_config)
