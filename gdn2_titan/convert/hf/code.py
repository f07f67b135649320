"""The model's code beside its weights, so that it loads with ``trust_remote_code=True`` where this package is not.

Made of this package's own sources when it is saved: the files that the model imports, each under one flat name, since
transformers fetches no folders. Their imports of each other are rewritten, and the Triton kernels are left out:
importing what is left out raises ImportError, and the op then takes its PyTorch path.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
from pathlib import Path

from gdn2_titan.convert.atomic import write_text

__all__ = ["save_code"]

PACKAGE = "gdn2_titan"
LEFT_OUT = tuple(f"{PACKAGE}.ops.{room}triton" for room in ("", "gdn2.", "short_conv."))
ENTRIES = {
    f"{PACKAGE}.convert.hf.{name}": name for name in ("configuration_gdn2", "modeling_gdn2", "classification_gdn2")
}
AUTO_MAP = {
    "AutoConfig": "configuration_gdn2.GDN2Config",
    "AutoModel": "modeling_gdn2.GDN2Decoder",
    "AutoModelForCausalLM": "modeling_gdn2.GDN2ForCausalLM",
    "AutoModelForQuestionAnswering": "classification_gdn2.GDN2ForQuestionAnswering",
    "AutoModelForSequenceClassification": "classification_gdn2.GDN2ForSequenceClassification",
    "AutoModelForTokenClassification": "classification_gdn2.GDN2ForTokenClassification",
}
HEADER = f"# Part of {PACKAGE} (Apache-2.0), written here by {PACKAGE}.convert.hf.save_code.\n"
NAMESPACE_FILE = "gdn2_namespace"
# Two copies in one process must not register their operators under one name: neither that of the package, nor another
# folder's. A module's own name tells copies of the same code apart.
NAMESPACE_SOURCE = '''"""The name under which this copy of the code registers its operators with torch."""

import hashlib

NAMESPACE = "{package}_" + hashlib.sha256((__name__ + "{digest}").encode()).hexdigest()[:16]
'''


def save_code(folder: str | os.PathLike[str]) -> None:
    """Write the code beside the model in ``folder`` and name it in its config.json.

    Raises:
        ValueError: there is no config.json of ours.
    """
    config_file = Path(folder) / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{config_file} cannot be read; it must be the config of a saved model") from error
    if not isinstance(config, dict) or config.get("model_type") != "gdn2":
        raise ValueError(f"{config_file} is not of this model; its model_type must be 'gdn2'")
    for name, source in flattened().items():
        (Path(folder) / f"{name}.py").write_text(source, encoding="utf-8")
    text = json.dumps(config | {"auto_map": AUTO_MAP}, indent=2, sort_keys=True) + "\n"
    write_text(config_file, text)  # last: until it names the code, the folder is what it was


def flattened() -> dict[str, str]:
    """{flat module name: source} of everything that the model imports."""
    files = {_flat(module): _rewritten(module)[0] for module in _reachable(ENTRIES)}
    for entry, name in ENTRIES.items():
        files[name] += _all_of(_reachable([entry]) - {entry})
    digest = hashlib.sha256("".join(files[name] for name in sorted(files)).encode()).hexdigest()
    return files | {NAMESPACE_FILE: HEADER + NAMESPACE_SOURCE.format(package=PACKAGE, digest=digest)}


def _reachable(modules):
    """These modules, and all that they import of this package."""
    found, waiting = set(), set(modules)
    while waiting:
        found |= waiting
        waiting = {imported for module in waiting for imported in _rewritten(module)[1]} - found
    return found


def _all_of(modules):
    """Lines that name every file to transformers, which fetches what lines of this form import; version 4 looks into
    the first file only. At its end, where all of them have been imported in the order that they want."""
    names = sorted({NAMESPACE_FILE, *map(_flat, modules)})
    return "\n" + "".join(f"from .{name} import __name__ as _\n" for name in names)


def _flat(module):
    return ENTRIES.get(module) or "gdn2_" + module.removeprefix(f"{PACKAGE}.").replace(".", "_")


@functools.cache
def _rewritten(module):
    """The source of a module as it stands beside a model, and the modules of this package that it imports."""
    spec = importlib.util.find_spec(module)
    source = Path(spec.origin).read_text(encoding="utf-8")
    package = module if spec.submodule_search_locations else module.rpartition(".")[0]
    lines, imported = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and PACKAGE in {alias.name.split(".")[0] for alias in node.names}:
            raise AssertionError(f"{module}:{node.lineno} imports {PACKAGE} by `import`; only `from` can be rewritten")
        if not isinstance(node, ast.ImportFrom):
            continue
        origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        if origin.split(".")[0] != PACKAGE:
            continue
        statements = []
        for alias in node.names:
            statement, target = _import_from(origin, alias)
            statements += statement
            imported += [target] if target else []
        indent = "\n" + " " * node.col_offset
        lines[node.lineno - 1] = " " * node.col_offset + indent.join(statements)
        for line in range(node.lineno, node.end_lineno):
            lines[line] = None
    source = "\n".join(line for line in lines if line is not None) + "\n"
    return HEADER + _with_own_namespace(source), imported


def _import_from(origin, alias):
    """The statements for ``from origin import alias``, and the module that they import or None."""
    inner, bound = f"{origin}.{alias.name}", alias.asname or alias.name
    if inner in LEFT_OUT or any(f"{origin}.".startswith(f"{room}.") for room in LEFT_OUT):
        return [f'raise ImportError("{inner} is not part of this copy of the code")'], None
    # A package may have a function of the name of a module; it is then the function that is imported.
    if not inspect.ismodule(getattr(importlib.import_module(origin), alias.name)):
        return [f"from .{_flat(origin)} import {alias.name} as {bound}"], origin
    return [f"from . import {_flat(inner)} as {bound}"], inner


def _with_own_namespace(source):
    """The source with its operators in the namespace of the copy."""
    changed = source.replace(f'"{PACKAGE}::', 'NAMESPACE + "::')
    changed = re.sub(rf"\btorch\.ops\.{PACKAGE}\b(?!\.\*)", "getattr(torch.ops, NAMESPACE)", changed)
    if changed == source:
        return source
    imports = [node for node in ast.parse(changed).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    lines = changed.splitlines()
    lines.insert(imports[-1].end_lineno, f"from .{NAMESPACE_FILE} import NAMESPACE")
    return "\n".join(lines) + "\n"
