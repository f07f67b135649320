"""gates.html: one page with the text, every quantity of every head as JSON, and the pictures. It loads nothing else."""

import base64
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from .gates_tokens import Token
from .gates_trace import QUANTITIES, LayerTrace, colours_of

__all__ = ["write_page"]

SHADES = 64
DIGITS = 4


def _rounded(values: Any) -> list[list[float]]:
    """Nested lists of floats with as many digits as a reader wants."""
    return [[float(f"{x:.{DIGITS}g}") for x in row] for row in values.tolist()]


def _content(about: str, tokens: list[Token], traces: list[LayerTrace], head: int) -> dict[str, Any]:
    """All that the page's script reads."""
    layers = []
    for trace in traces:
        reach = {"erase": trace.erase_scale, "write": 1.0}
        colours = {name: colours_of(q.scale, reach.get(name, 1.0)) for name, q in QUANTITIES.items()}
        values = {name: _rounded(getattr(trace, name)) for name in QUANTITIES}
        deviation = float(f"{trace.deviation:.1e}")
        layers.append(dict(layer=trace.layer, reach=reach, colours=colours, deviation=deviation, values=values))
    names, steps = [name for layer in layers for name in layer["colours"].values()], np.linspace(0, 1, SHADES)
    return {
        "about": about,
        "tokens": [token._asdict() for token in tokens],
        "quantities": {name: quantity._asdict() for name, quantity in QUANTITIES.items()},
        "shades": {name: list(map(to_hex, matplotlib.colormaps[name](steps))) for name in names},
        "layers": layers,
        "chosen": {"layer": next(trace.layer for trace in traces if trace.channels is not None), "head": head},
    }


def _picture(folder: Path, name: str) -> str:
    data = base64.b64encode((folder / name).read_bytes()).decode()
    image = f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
    return f'<details open><summary>{html.escape(name)}</summary><div class="picture">{image}</div></details>'


def write_page(
    folder: Path, about: str, tokens: list[Token], traces: list[LayerTrace], head: int, pictures: list[str]
) -> None:
    """Write gates.html beside the PNG files ``pictures`` in ``folder``. The rest as for ``draw_figures``."""
    style, script, template = (
        (resources.files(__package__) / "assets" / f"gates.{kind}").read_text(encoding="utf-8")
        for kind in ("css", "js", "html")
    )
    content = json.dumps(_content(about, tokens, traces, head), allow_nan=False, separators=(",", ":"))
    # Without <, > and &, which are \u escapes in JSON, no text can end the script element.
    content = re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", content)
    parts = {
        "about": html.escape(about), "style": style, "script": script, "content": content,
        "pictures": "\n".join(_picture(folder, name) for name in pictures),
    }  # fmt: skip
    # In one pass: what is put in is not looked through for more.
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)
    (folder / "gates.html").write_text(page, encoding="utf-8")
