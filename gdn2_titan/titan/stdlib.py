"""The source text of the running Python's standard library, in two splits."""

import hashlib
import sysconfig
from pathlib import Path

from gdn2_titan.titan.errors import ConfigError

__all__ = ["is_held_out", "stdlib_documents"]

# Tests are more than half of the library's bytes and much of them is data (code point tables, certificates, damaged
# source on purpose); without them the corpus is code that people wrote to be read.
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_VALIDATION_ONE_IN = 20


def stdlib_documents(*, held_out: bool) -> dict[str, str]:
    """Source text of the running Python's standard library, without its tests.

    Whether a file is held out depends on a hash of its path alone (about one in twenty is), so no other file and no
    machine moves it from one split to the other.

    Returns:
        Text by path relative to the library's folder (with ``/``), sorted by that path. Empty files and files that
        are not UTF-8 are left out.

    Raises:
        ConfigError: if this Python comes without the source of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = {}
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if _EXCLUDED_FOLDERS.intersection(name.split("/")[:-1]) or is_held_out(name) != held_out:
            continue
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):  # OSError: a link to nowhere, as some distributions leave behind
            continue
        if text:
            documents[name] = text
    if not documents:
        raise ConfigError(f'dataset = "stdlib" needs the source files of the standard library; {root} has none.')
    return documents


def is_held_out(name: str) -> bool:
    """Whether the standard library's file of that relative path belongs to the validation split."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big") % _VALIDATION_ONE_IN == 0
