"""Tables in a document between marks: ``<!-- name -->`` and ``<!-- end of name -->``."""

import re

__all__ = ["write"]


def write(document, tables):
    """Replace what lies between the two marks of each name. tables: {name: Markdown}; each pair is there once."""
    text = document.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text, n = re.subn(
            f"(?s){re.escape(begin)}.*{re.escape(end)}", lambda _, new=f"{begin}\n\n{table}\n\n{end}": new, text
        )
        assert n == 1, f"{document} must have {begin} and {end} once"
    document.write_text(text)
