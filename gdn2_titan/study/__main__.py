"""The command line: ``python -m gdn2_titan.study recall --out DIR`` and ``gates --model FOLDER --text FILE``."""

import argparse
import sys
from collections.abc import Sequence

from gdn2_titan.convert.errors import ConvertError, exit_status

from . import gates, recall


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser("python -m gdn2_titan.study", description="Studies of what a model does.")
    subparsers = parser.add_subparsers(required=True, metavar="STUDY")
    for command in (recall, gates):
        command.add_parser(subparsers)  # which names the function that runs it by ``set_defaults(run=)``
    return exit_status(_run, parser.parse_args(arguments))


def _run(options):
    try:
        options.run(options)
    except ImportError as error:
        raise ConvertError(f"{error}; this study needs the extra 'study': pip install 'gdn2_titan[study]'") from error


if __name__ == "__main__":
    sys.exit(main())
