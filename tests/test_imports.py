"""How the rooms of the package may import each other, and what its public functions say of their arguments.

Read from the source: imports within functions count as those at the top of a file do.
"""

import ast
import functools
import graphlib
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

import gdn2_titan

ROOT = Path(gdn2_titan.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MOST_LINES = 400

# Room: what it may import of the package, beside itself. What is not here (study, serve, generate and other commands)
# may import all rooms, and none of the rooms may import it.
BELOW = {
    "needle_text": set(),
    "ops": set(),
    "models": {"ops"},
    "parallel": {"models", "ops"},
    "convert": {"models", "ops"},
    "titan": {"parallel", "convert", "models", "ops", "needle_text"},
    "serve": {"convert", "models", "ops"},
}
# The same within ops; its own files, and those of ops/triton, are shared by all.
BELOW_OPS = {
    "gdn2": {"shared"},
    "short_conv": {"shared"},
    "context_parallel": {"gdn2", "short_conv", "shared"},
    "shared": set(),
}
# Package of others: where it may be imported.
OTHERS = {
    "torchtitan": ("titan", "study"),
    "vllm": ("serve",),
    "transformers": ("convert.hf", "evaluate", "generate", "study", "model_options"),
    "lm_eval": ("evaluate",),
    "triton": ("ops.triton", "ops.gdn2.triton", "ops.short_conv.triton"),
}


def _module(path):
    """("models", "layer") of .../gdn2_titan/models/layer.py; a package's own file has the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


@functools.cache
def _tree(path):
    return ast.parse(path.read_text())


def _imported(path):
    """(line, full name) of each module that a file imports, and of each name that it imports from one."""
    package = ("gdn2_titan", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _ours():
    """(path, line, importing module, imported module or name), both as tuples without the package's name."""
    for path in FILES:
        for line, name in _imported(path):
            package, *rest = name.split(".")
            if package == "gdn2_titan" and rest:
                yield path, line, _module(path), tuple(rest)


def _place(path, line):
    return f"{path.relative_to(ROOT.parent)}:{line}"


def test_rooms_import_only_what_is_below_them():
    wrong = []
    for path, line, importing, imported in _ours():
        room = importing[0] if importing else None
        if room in BELOW and imported[0] not in {room, "__version__"} | BELOW[room]:
            wrong.append(f"{_place(path, line)}: {room} imports {'.'.join(imported)}")
    assert not wrong, "\n".join(wrong)


def _room_of_ops(module):
    """Of a module within ops; ops itself has no room: it offers what all of them have."""
    return module[1] if len(module) > 1 and module[1] in BELOW_OPS else "shared"


def test_within_ops_context_parallelism_is_on_top_and_the_shared_files_at_the_bottom():
    wrong = []
    for path, line, importing, imported in _ours():
        if importing[:1] != ("ops",) or len(importing) == 1 or imported[0] != "ops":
            continue
        room, other = _room_of_ops(importing), _room_of_ops(imported)
        if other not in {room} | BELOW_OPS[room]:
            wrong.append(f"{_place(path, line)}: {room} imports {'.'.join(imported)}")
    assert not wrong, "\n".join(wrong)


def test_no_file_comes_back_to_itself_by_way_of_what_it_imports():
    files = {_module(path) for path in FILES}
    # A name that is imported from a file is of that file. A package's own file is its face, and not followed.
    below = {module: set() for module in files}
    for path, _, importing, imported in _ours():
        found = next((imported[:n] for n in (len(imported), len(imported) - 1) if imported[:n] in files), None)
        if path.name != "__init__.py" and found and found != importing:
            below[importing].add(found)
    try:
        graphlib.TopologicalSorter(below).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(".".join(module) for module in error.args[1]))


@pytest.mark.parametrize("package", OTHERS)
def test_a_package_of_others_is_imported_only_where_it_belongs(package):
    found, wrong = 0, []
    for path in FILES:
        module = ".".join(_module(path)) + "."
        for line, name in _imported(path):
            if name.split(".")[0] == package:
                found += 1
                if not module.startswith(tuple(f"{place}." for place in OTHERS[package])):
                    wrong.append(_place(path, line))
    assert found and not wrong, "\n".join(wrong)


def _distribution(name):
    return name.lower().replace("_", "-")


def _of_extra(name, project):
    """The packages that an extra installs, None for the bare package, and those that each wants for itself."""
    wanted = project["dependencies"] + (project["optional-dependencies"][name] if name else [])
    for requirement in wanted:
        package, of = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", requirement).groups()
        if package == project["name"]:
            for extra in of.split(","):
                yield from _of_extra(extra, project)
            continue
        yield _distribution(package)
        try:
            others = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            others = []  # vLLM has an environment of its own
        yield from (_distribution(re.match(r"[\w.-]+", each)[0]) for each in others if "extra ==" not in each)


def _at_import(node):
    """The nodes that run when a file is imported: not those of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from _at_import(child)


@pytest.mark.parametrize(
    "extra, entries",
    [
        (None, ["ops", "models", "parallel"]),
        ("titan", ["titan", "titan.config_registry", "titan.tokenize"]),
        ("hf", ["convert.hf", "convert.__main__", "generate", "evaluate.__main__"]),
        ("eval", ["evaluate.harness"]),
        ("serve", ["serve", "serve.model"]),
        ("study", ["study.__main__"]),
    ],
)
def test_what_an_entry_imports_is_installed_by_its_extra(extra, entries):
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    allowed, files = set(_of_extra(extra, project)), {_module(path): path for path in FILES}
    distributions = importlib.metadata.packages_distributions()
    waiting, seen, wrong = [tuple(entry.split(".")) for entry in entries], set(), []
    assert files.keys() >= set(waiting)
    while waiting:
        module = waiting.pop()
        if module not in files or module in seen:
            continue
        seen.add(module)
        waiting.extend(module[:n] for n in range(1, len(module)))  # the packages that it lies in
        lines = {node.lineno for node in _at_import(_tree(files[module])) if hasattr(node, "lineno")}
        for line, name in _imported(files[module]):
            package, *rest = name.split(".")
            if line not in lines or package in sys.stdlib_module_names:
                continue
            if package == "gdn2_titan":
                waiting += [tuple(rest[:n]) for n in range(1, len(rest) + 1)]
            elif not allowed & {*map(_distribution, distributions.get(package, [package]))}:
                wrong.append(f"{_place(files[module], line)}: {package}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_file_is_longer_than_a_reader_can_hold():
    lengths = {path: len(path.read_text().splitlines()) for path in FILES}
    wrong = [f"{path.relative_to(ROOT.parent)}: {n} lines" for path, n in lengths.items() if n > MOST_LINES]
    assert not wrong, "\n".join(wrong)


def _public_functions(path):
    """The functions of a file that its ``__all__`` names, but for kernels, which Triton compiles."""
    lists = [node.value for node in _tree(path).body if isinstance(node, (ast.Assign, ast.AugAssign))
             and "__all__" in {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}]  # fmt: skip
    public = {x.value for node in lists for x in ast.walk(node) if isinstance(x, ast.Constant)}
    for node in _tree(path).body:
        if isinstance(node, ast.FunctionDef) and node.name in public:
            if not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield node


def _unannotated(function):
    """The names of its parameters without annotation, and "return" if it does not say what it returns."""
    args = function.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, [args.vararg, args.kwarg])]
    return [x.arg for x in every if x.annotation is None] + ["return"] * (function.returns is None)


def test_every_public_function_is_annotated():
    functions = [(path, function) for path in FILES for function in _public_functions(path)]
    assert len(functions) > 50
    wrong = [f"{_place(path, function.lineno)}: {function.name}: {', '.join(missing)}"
             for path, function in functions if (missing := _unannotated(function))]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_the_package_tells_its_version_and_that_it_is_typed():
    assert gdn2_titan.__version__ == importlib.metadata.version("gdn2_titan")
    assert (ROOT / "py.typed").is_file()
