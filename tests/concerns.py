"""Which test files concern TorchTitan: those that the tests of a second generation of it must run."""

import ast
import functools
from pathlib import Path

__all__ = ["concerns_titan"]

ROOT = Path(__file__).resolve().parents[1]
TITAN = ("torchtitan", "gdn2_titan.titan")


@functools.cache
def concerns_titan(path):
    """Whether a file of tests, or one that it imports, imports TorchTitan or the plug, at its top or in a function."""
    for name in _imported(path):
        if name in TITAN or name.startswith(tuple(f"{module}." for module in TITAN)):
            return True
        *module, _ = name.split(".")
        helper = ROOT.joinpath(*module).with_suffix(".py")
        if module[:1] == ["tests"] and helper.is_file() and concerns_titan(helper):
            return True
    return False


def _imported(path):
    """Names in full: of modules, and of what is imported from them."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)
