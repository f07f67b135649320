"""Tables in Markdown, and their places in a document: between ``<!-- name -->`` and ``<!-- end of name -->``."""

import re
from pathlib import Path

__all__ = ["DOCS", "table", "write"]

DOCS = Path(__file__).parents[1] / "docs"


def table(head, rows, align="---"):
    lines = [head, [align] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write(document, tables):
    """Replace what lies between the two marks of each name. tables: {name: Markdown}; each pair is there once."""
    text = document.read_text()
    for name, new in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        parts = re.split(f"(?s)(?<={re.escape(begin)}).*(?={re.escape(end)})", text)
        assert len(parts) == 2, f"{document} must have {begin} and {end} once"
        text = f"\n\n{new}\n\n".join(parts)
    document.write_text(text)
