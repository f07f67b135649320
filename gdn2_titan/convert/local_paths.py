"""Values without the folders of the machine that wrote them, for what is published."""

import json
import re

__all__ = ["without_folders"]

# How a value begins that is a path as a whole, with whatever spaces in it.
_IS_PATH = re.compile(r"[/~]|\.{1,2}([\\/]|$)|[A-Za-z]:[\\/]|\\\\|file:")
# Folders of a path inside of a sentence. What follows a letter, a dot or a colon is of a URL or an "and/or".
_FOLDERS = re.compile(r"(?<![\w:/.])~?/(?:[\w.@+-]+/)+|(?<!\w)[A-Za-z]:\\(?:[^\\\s]+\\)*")
# Fields of a job config that hold a path, relative ones too.
_PATH_FIELD = re.compile(r"(^|_)(folder|dir|file|csv|assets_path|load_path|tokenizer_path)$")
_FILE = re.compile(r"^\S*[*?]|\.(txt|text|jsonl?|parquet|csv|md|py|gz|zst)$", re.IGNORECASE)


def without_folders(value, field=""):
    """A JSON value, in which of every local path only the last name is left. Names of datasets and URLs stay.

    field: the name that ``value`` has. Values that JSON has no word for become strings.
    """
    if isinstance(value, dict):
        return {key: without_folders(one, str(key)) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(one, field) for one in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = value if isinstance(value, str) else json.loads(json.dumps(value, default=str))
    if not isinstance(text, str):
        return without_folders(text, field)
    local = _IS_PATH.match(text) or _PATH_FIELD.search(field) or ("://" not in text and _FILE.search(text))
    if local:
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return _FOLDERS.sub("", text)
