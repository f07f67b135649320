"""What benchmarks leave: tables in Markdown, their places in documents, files of results."""

import datetime
import json
import re
import shutil
import subprocess
from pathlib import Path

import torch

__all__ = ["DOCS", "describe", "fill", "one_line", "table", "write"]

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


def describe(device):
    """Date, device and versions: what a figure means nothing without. device: "cuda" or "cpu"."""
    found = {"date": datetime.date.today().isoformat(), "device": device, "torch": torch.__version__}
    if device == "cuda":
        import triton

        found |= {"device": torch.cuda.get_device_name(), "runtime": torch.version.hip or torch.version.cuda}
        found["triton"] = triton.__version__
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
    return found


def write(folder, name, facts, rows, lines):
    """name.json with the device's facts and the rows, and name.md with the facts and the lines; prints the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"device": facts, "rows": rows}, indent=1))
    text = "\n".join([", ".join(f"{key} {value}" for key, value in facts.items()), "", *lines])
    (folder / f"{name}.md").write_text(text)
    print(text)
