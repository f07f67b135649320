"""What benchmarks leave: tables in Markdown, their places in documents, files of results."""

import json
import re
from pathlib import Path

__all__ = ["DOCS", "failures", "fill", "one_line", "table", "write"]

DOCS = Path(__file__).parents[1] / "docs"


def table(head, rows, align="---"):
    lines = [head, [align] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def fill(document, tables):
    """Replace what lies between ``<!-- name -->`` and ``<!-- end of name -->``. tables: {name: Markdown}; each pair of
    marks is in the document once."""
    text = document.read_text()
    for name, new in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        parts = re.split(f"(?s)(?<={re.escape(begin)}).*(?={re.escape(end)})", text)
        assert len(parts) == 2, f"{document} must have {begin} and {end} once"
        text = f"\n\n{new}\n\n".join(parts)
    document.write_text(text)


def one_line(error):
    """What is written of a case that an exception ended."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def failures(rows, form):
    """Lines for the rows that have an error. form: what names a row, for str.format."""
    failed = [row for row in rows if "error" in row]
    return ["Did not run:", "", *(f"- {form}: {{error}}".format(**row) for row in failed), ""] if failed else []


def write(folder, name, facts, rows, lines):
    """name.json with the device's facts and the rows, and name.md with the facts and the lines; prints the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"device": facts, "rows": rows}, indent=1))
    text = "\n".join([", ".join(f"{key} {value}" for key, value in facts.items()), "", *lines])
    (folder / f"{name}.md").write_text(text)
    print(text)
