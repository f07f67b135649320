"""Job configs from TOML files that tests write."""

from unittest import mock

import pytest

from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.job_config import parse, validate

__all__ = ["assert_refused", "check", "write_toml"]

BASE = {
    "job": {"custom_config_module": "gdn2_titan.titan.job_config"},
    "model": {"flavor": "debug_hybrid"},
    "training": {"dataset": "stdlib"},
}


def write_toml(path, changes):
    sections = {name: dict(fields) for name, fields in BASE.items()}
    for field, value in changes.items():
        section, _, name = field.rpartition(".")
        sections.setdefault(section, {})[name] = value

    def literal(value):
        return {True: "true", False: "false"}.get(value) if isinstance(value, bool) else repr(value).replace("'", '"')

    text = "\n".join(
        f"[{section}]\n" + "\n".join(f"{name} = {literal(value)}" for name, value in fields.items())
        for section, fields in sections.items()
    )
    path.write_text(text)
    return str(path)


def check(path, *arguments):
    """The job config, unless it is refused with a torch that has the pipelines of either TorchTitan."""
    # tyro would read the sources of all sections again, for the texts of --help: half of the time.
    no_help = mock.patch("tyro._docstrings.get_field_docstring", lambda *_: None)
    with mock.patch("gdn2_titan.titan.pipeline.RUNS", True), no_help:
        config = parse([f"--job.config_file={path}", *arguments])
        validate(config)
        return config


def assert_refused(path, parts):
    """In one sentence, with all these parts."""
    with pytest.raises(ConfigError) as refusal:
        check(path)
    message = str(refusal.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
