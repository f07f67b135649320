"""A job config as the text of a TOML file."""

import json

__all__ = ["toml_text"]


def toml_text(sections):
    """``{"training": {"steps": 10}}`` as TOML: sections of texts, numbers, truth values and lists of them."""
    # Of these kinds, JSON's notation is TOML's.
    blocks = (
        "\n".join([f"[{name}]", *(f"{field} = {json.dumps(value)}" for field, value in fields.items())])
        for name, fields in sections.items()
    )
    return "\n\n".join(blocks) + "\n"
