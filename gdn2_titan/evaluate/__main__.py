"""The paper's tables 2 and 3 with a row for a model: ``python -m gdn2_titan.evaluate --model FOLDER --tasks paper``.

The folder is a TorchTitan checkpoint (a step, or a run's folder: the latest) or a Hugging Face folder of ours.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gdn2_titan.convert.errors import ConvertError, exit_status
from gdn2_titan.convert.run_folders import checkpoint_folder
from gdn2_titan.model_options import add_model_options, number

from .needles import NEEDLE_TASKS
from .network import leave_the_hub_alone_where_there_is_none
from .paper import LENGTHS, PAPER, TABLE_2

SAMPLES = 500  # as many as RULER has
MAX_LENGTH = 4096  # that the paper's models were trained with; lm-eval's own default is 2,048
# Options that mean something to a part of the tasks.
OF_NEEDLES, OF_LM_EVAL = ("samples", "lengths", "seed"), ("limit", "max_length", "include_path")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m gdn2_titan.evaluate", description=__doc__.splitlines()[0])
    add_model_options(parser)
    add = parser.add_argument
    add(
        "--tasks", type=_names, required=True, metavar="A,B",
        help=f"'{PAPER}': those of the paper's tables 2 and 3; {', '.join(NEEDLE_TASKS)}; names of lm-eval's",
    )  # fmt: skip
    count = number(int, "a whole number of at least 1", lambda x: x >= 1)
    add("--batch-size", type=count, default=8, metavar="N", help="documents or prompts at a time (default: 8)")
    add("--limit", type=count, metavar="N", help="documents of each of lm-eval's tasks (default: all)")
    add("--max-length", type=count, metavar="N", help=f"tokens of context, of lm-eval's (default: {MAX_LENGTH:,})")
    add("--include-path", metavar="FOLDER", help="lm-eval's YAML files of tasks of your own")
    add("--samples", type=count, metavar="N", help=f"prompts per needle task and length (default: {SAMPLES})")
    add("--lengths", type=_lengths, metavar="N,N", help="tokens of the needles' contexts (default: the paper's)")
    add("--haystack", metavar="FILE", help="text to hide needles in; s-niah-1 needs none")
    seed = number(int, "a whole number of at least 0", lambda x: x >= 0)
    add("--seed", type=seed, metavar="N", help="of the needles' prompts (default: 0)")
    add("--output", metavar="FILE.json", help="to write results and settings to, after each task anew")
    return parser


def _names(text):
    names = [name.strip() for name in text.split(",")]
    names = [name.lower() if name.lower() in NEEDLE_TASKS else name for name in names]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"is {text!r}; it must be different names with commas between them")
    return names


def _lengths(text):
    parse = number(int, "whole numbers of at least 1 with commas between them", lambda x: x >= 1)
    return sorted({parse(part) for part in text.split(",")})


def _tasks(options: argparse.Namespace) -> dict[str, bool]:
    """{name: whether it is asked for by its own name}, of lm-eval's tasks first."""
    tasks = dict.fromkeys((name for name in options.tasks if name != PAPER), True)
    if PAPER in options.tasks:
        for name in (*(column.task for column in TABLE_2), *LENGTHS):
            tasks.setdefault(name, False)
    return dict(sorted(tasks.items(), key=lambda task: task[0] in NEEDLE_TASKS))


def evaluate(options: argparse.Namespace) -> None:
    """Print the tables to stdout and what is under way to stderr, and write the file.

    Raises:
        ConvertError: one sentence about what is wrong with the options or the checkpoint, or if nothing could be run.
    """
    checkpoint_folder(options.model)  # a path that is not there is answered before torch is imported
    tasks = _tasks(options)
    _refuse_unused(options, tasks)
    buried = [name for name in tasks if name in NEEDLE_TASKS and not NEEDLE_TASKS[name].noise]
    for name in buried:
        if tasks[name] and options.haystack is None:
            raise ConvertError(f"--tasks has {name}, which hides needles in a text; --haystack must name its file")
    if options.haystack is not None and not buried:
        raise ConvertError("--haystack is given, and --tasks has none that hides needles in it")
    haystack = _read(options.haystack)
    options.samples, options.seed = options.samples or SAMPLES, options.seed or 0
    options.max_length = options.max_length or MAX_LENGTH
    if options.output is not None and Path(options.output).is_dir():
        raise ConvertError(f"--output is {options.output!r}, a folder; it must be a file")
    if options.output is not None and not Path(options.output).parent.is_dir():
        raise ConvertError(f"--output is {options.output!r}; its folder must be there")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise ConvertError(f"--include-path is {options.include_path!r}; it must be a folder")
    if tasks.keys() - NEEDLE_TASKS:
        leave_the_hub_alone_where_there_is_none()
    try:
        from .run import run
    except ImportError as error:
        raise ConvertError(f"{error}; evaluating needs the extra 'hf': pip install 'gdn2_titan[hf]'") from error
    run(options, list(tasks), haystack)


def _refuse_unused(options, tasks):
    for names, kind, used in (
        (OF_NEEDLES, "needle tasks", NEEDLE_TASKS.keys() & tasks),
        (OF_LM_EVAL, "lm-eval's tasks", tasks.keys() - NEEDLE_TASKS),
    ):
        for name in names:
            if getattr(options, name) is not None and not used:
                raise ConvertError(f"--{name.replace('_', '-')} is given, and --tasks has none of {kind}")


def _read(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise ConvertError(f"--haystack is {path!r}, which cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConvertError(f"--haystack is {path!r}; it must be text in UTF-8") from error
    if not text.strip():
        raise ConvertError(f"--haystack is {path!r}, which has no text")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after one sentence on stderr."""
    return exit_status(evaluate, _parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
