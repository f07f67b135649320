"""What a checkpoint was trained with: ``gdn2.json`` in the folder of a run's checkpoints, or in a checkpoint itself."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from gdn2_titan.models import GDN2ModelArgs

from .aside import write_text
from .errors import ConvertError, reading

__all__ = ["RECORD", "Record", "args_from_fields", "args_to_fields", "find_record", "write_record"]

RECORD = "gdn2.json"


@dataclass(frozen=True)
class Record:
    """model_args: of the model. job_config: TorchTitan's whole job config as a dict, or None where none is known."""

    model_args: GDN2ModelArgs
    job_config: dict | None = None


def args_to_fields(args):
    """Plain JSON values of every field of GDN2ModelArgs."""
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(GDN2ModelArgs)}
    return fields | {"layer_pattern": list(args.layer_pattern)}


def args_from_fields(fields, path):
    """GDN2ModelArgs of a dict; fields that are not there keep their default, and others are left alone.

    Raises:
        ConvertError: naming ``path`` and the field that no model can be built from.
    """
    known = {field.name for field in dataclasses.fields(GDN2ModelArgs)}
    fields = {name: value for name, value in fields.items() if name in known}
    if isinstance(fields.get("layer_pattern"), list):
        fields["layer_pattern"] = tuple(fields["layer_pattern"])
    args = GDN2ModelArgs(**fields)
    try:
        args.validate()
    except (ValueError, TypeError) as error:
        raise ConvertError(f"{path} describes no model that can be built: {error}") from error
    return args


def write_record(folder, record):
    """Writes ``gdn2.json``, whole or not at all."""
    content = {"model_args": args_to_fields(record.model_args), "job_config": record.job_config}
    # A job config may hold paths and other values that JSON has no word for.
    write_text(Path(folder) / RECORD, json.dumps(content, indent=2, default=str) + "\n")


def find_record(checkpoint):
    """The Record in a checkpoint's folder or in the one around it, or None."""
    checkpoint = Path(checkpoint).absolute()
    for path in (checkpoint / RECORD, checkpoint.parent / RECORD):
        if path.is_file():
            with reading(path):
                content = json.loads(path.read_text(encoding="utf-8"))
                return Record(args_from_fields(content["model_args"], path), content.get("job_config"))
    return None
