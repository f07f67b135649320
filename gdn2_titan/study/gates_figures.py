"""Pictures of traces: strips of [heads or channels x tokens] over the text, broken into lines as a text is."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, NullFormatter

from .gates_tokens import Token
from .gates_trace import QUANTITIES, Channels, LayerTrace, colours_of

__all__ = ["draw_figures"]

DPI = 100
# All in inches.
COLUMNS, COLUMN = 130, 0.115
LEFT, RIGHT = 1.15, 0.35
HEAD_ROW, TALLEST_STRIP, LEAST_STRIP = 0.15, 3.2, 0.32
BAR_WIDTH, BAR_ROW = 3.2, 0.72
TITLE, GAP, GROUP_GAP, BETWEEN_LINES, NUMBERS = 0.72, 0.09, 0.2, 0.3, 0.22
ABOVE_EXTRA, DISTRIBUTION, BELOW_EXTRA = 0.2, 3.0, 0.55
SUBTITLE_CHARACTER = 0.08
LONGEST_LABEL = 12
# Taller pictures of all layers are one picture per layer.
TALLEST = 60.0
MONOSPACE = FontProperties(family="DejaVu Sans Mono", size=7.5)  # comes with matplotlib
# A half-life that is drawn is no less than this; a decay at once has 0.
SHORTEST = 1e-3


class Strip(NamedTuple):
    group: str  # strips of a group stand closer together
    name: str
    values: np.ndarray  # [rows, T]
    norm: Normalize
    colours: str
    bar: str  # the legend of its colours; strips of the same legend share one


@functools.cache
def _glyphs():
    return frozenset(get_font(findfont(MONOSPACE)).get_charmap())


def _drawable(text: str, longest: int) -> str:
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(c if ord(c) in _glyphs() else "□" for c in text)


class _Sheet:
    """Where the parts of a picture of these strips go, in inches from its top left corner."""

    def __init__(self, tokens, strips, above):
        self.labels = [_drawable(token.label, LONGEST_LABEL) for token in tokens]
        lines = -(-len(tokens) // COLUMNS)
        self.columns = -(-len(tokens) // lines)  # lines of nearly the same length
        self.width = LEFT + RIGHT + max(self.columns * COLUMN, 2 * BAR_WIDTH)
        self.bars = list({strip.bar: strip for strip in strips}.values())
        self.bars_per_row = int((self.width - LEFT) // BAR_WIDTH)
        bar_rows = -(-len(self.bars) // self.bars_per_row)
        self.bars_top = TITLE + above * (ABOVE_EXTRA + DISTRIBUTION + BELOW_EXTRA)
        self.lines_top = self.bars_top + bar_rows * BAR_ROW
        self.placed, top = [], NUMBERS  # strips, their tops in a line of text, their heights
        for index, strip in enumerate(strips):
            if index:
                top += GAP if strip.group == strips[index - 1].group else GROUP_GAP
            height = min(max(HEAD_ROW * len(strip.values), LEAST_STRIP), TALLEST_STRIP)
            self.placed.append((strip, top, height))
            top += height
        self.line = top + 0.1 + 0.068 * max(map(len, self.labels)) + BETWEEN_LINES
        self.starts = range(0, len(tokens), self.columns) if strips else range(0)
        self.height = self.lines_top + self.line * len(self.starts)
        self.figure = Figure((self.width, self.height), dpi=DPI, facecolor="white")

    def axes(self, left, top, width, height):
        bottom = self.height - top - height
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def text(self, top, text, **options):
        self.figure.text(0.2 / self.width, 1 - top / self.height, text, va="top", parse_math=False, **options)


def _plain_numbers(axis, norm):
    """1, 2, 5, 10, ... along a logarithmic axis, and fewer of them the more decades there are."""
    decades = np.log10(norm.vmax / norm.vmin)
    subs = (1, 1.5, 2, 3, 4, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 2.5 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _draw_bars(sheet):
    for index, strip in enumerate(sheet.bars):
        row, column = divmod(index, sheet.bars_per_row)
        ax = sheet.axes(LEFT + column * BAR_WIDTH, sheet.bars_top + row * BAR_ROW + 0.2, BAR_WIDTH - 0.55, 0.11)
        scale = matplotlib.cm.ScalarMappable(strip.norm, strip.colours)
        bar = sheet.figure.colorbar(scale, cax=ax, orientation="horizontal")
        if isinstance(strip.norm, LogNorm):
            _plain_numbers(bar.ax.xaxis, strip.norm)
        bar.ax.tick_params(labelsize=8)
        bar.ax.set_title(strip.bar, fontsize=8.5, loc="left", pad=3)


def _draw_line(sheet, start):
    """The strips over the tokens from ``start``, their text below."""
    stop = min(start + sheet.columns, len(sheet.labels))
    line_top = sheet.lines_top + sheet.line * (start // sheet.columns)
    for index, (strip, top, height) in enumerate(sheet.placed):
        ax = sheet.axes(LEFT, line_top + top, (stop - start) * COLUMN, height)
        values = strip.values[:, start:stop]
        ax.imshow(values, aspect="auto", cmap=strip.colours, norm=strip.norm, interpolation="nearest")
        rows = len(values)
        step = 1 if height / rows >= 0.14 else 2 ** int(np.ceil(np.log2(0.14 * rows / height)))
        ax.set_yticks(range(0, rows, step))
        ax.tick_params(labelsize=7, length=2, pad=2)
        ax.set_xticks([])
        ax.set_ylabel(f"{strip.group}\n{strip.name}", rotation=0, ha="right", va="center", fontsize=8, labelpad=6)
        if index == 0:
            for place in range(-(-start // 16) * 16, stop, 16):
                ax.annotate(
                    str(place), (place - start, 1), (0, 3), xycoords=("data", "axes fraction"),
                    textcoords="offset points", ha="center", va="bottom", fontsize=7, color="0.35",
                )  # fmt: skip
    ax.set_xticks(range(stop - start))
    for label in ax.set_xticklabels(sheet.labels[start:stop], fontproperties=MONOSPACE, parse_math=False):
        label.set_rotation(0 if len(label.get_text()) == 1 else 90)
    ax.tick_params(axis="x", length=0, pad=4)


def _log_norm(values):
    """Of half-lives: decades around them."""
    low, high = (np.log10(np.maximum([values.min(), values.max()], SHORTEST)) + [-0.02, 0.02]).tolist()
    return LogNorm(10**low, 10**high)


def _layer_strip(trace: LayerTrace, name: str, norm: Normalize, bar: str) -> Strip:
    scale, values = QUANTITIES[name].scale, getattr(trace, name)
    values = np.maximum(values, SHORTEST) if scale == "log" else values
    short = QUANTITIES[name].title.removesuffix(" gate").removesuffix(" norm")
    return Strip(f"layer {trace.layer}", short, values, norm, colours_of(scale, norm.vmax), bar)


def _gate_strips(trace: LayerTrace) -> list[Strip]:
    return [
        _layer_strip(trace, name, Normalize(0, reach), f"{QUANTITIES[name].title}: {QUANTITIES[name].meaning}")
        for name, reach in (("erase", trace.erase_scale), ("write", 1))
    ]


def _memory_strips(trace: LayerTrace) -> list[Strip]:
    changes = ("erased", "written", "decayed")  # on one scale, so that they compare
    norm = Normalize(0, max(getattr(trace, name).max() for name in changes) or 1.0)
    bar = f"layer {trace.layer}: erased, written, decayed (norm)"
    strips = [_layer_strip(trace, name, norm, bar) for name in changes]
    norm = Normalize(0, trace.state.max() or 1.0)
    return [*strips, _layer_strip(trace, "state", norm, f"layer {trace.layer}: norm of the memory")]


def _draw_half_lives(traces, ax):
    """Every channel's half-life, by layer and head."""
    generator = np.random.default_rng(0)  # of the places sideways only
    everything = np.maximum(np.concatenate([trace.half_lives.ravel() for trace in traces]), SHORTEST)
    colours = matplotlib.colormaps["tab10"].colors
    for place, trace in enumerate(traces):
        heads = len(trace.half_lives)
        for head, values in enumerate(np.maximum(trace.half_lives, SHORTEST)):
            middle, width = place + 0.8 * ((head + 0.5) / heads - 0.5), 0.8 / heads
            x = middle + 0.6 * width * (generator.random(len(values)) - 0.5)
            ax.plot(x, values, ".", color=colours[head % 10], alpha=0.6, markersize=5.5, markeredgewidth=0)
            ax.plot([middle - 0.4 * width, middle + 0.4 * width], [np.median(values)] * 2, color="0.1", linewidth=1.5)
            if len(traces) * heads <= 72:
                name = f"head {head}" if len(traces) * heads <= 16 else str(head)
                ax.annotate(name, (middle, 0), (0, 2), xycoords=("data", "axes fraction"),
                            textcoords="offset points", ha="center", fontsize=7, color="0.35")  # fmt: skip
    ax.set(yscale="log", ylim=(everything.min() / 2, everything.max() * 1.5), ylabel="half-life in tokens")
    _plain_numbers(ax.yaxis, Normalize(*ax.get_ylim()))
    ax.set_xlim(-0.5, len(traces) - 0.5)
    ax.set_xticks(range(len(traces)), [f"layer {trace.layer}" for trace in traces])
    ax.grid(axis="y", color="0.88")
    ax.set_axisbelow(True)
    title = "one dot per key channel, columns and colours are heads, the bar is a head's median"
    ax.set_title(title, fontsize=9, loc="left")


def _channel_strips(channels: Channels, reach: float) -> list[Strip]:
    half_life = np.maximum(channels.half_life.T, SHORTEST)
    return [
        Strip("erase", "channel", channels.erase.T, Normalize(0, reach), colours_of("gate", reach), "erase gate"),
        Strip("write", "channel", channels.write.T, Normalize(0, 1), colours_of("gate"), "write gate"),
        Strip("half-life", "channel", half_life, _log_norm(half_life), colours_of("log"), "half-life in tokens"),
    ]


def draw_figures(
    folder: Path, subtitle: str, tokens: list[Token], traces: list[LayerTrace], head: int,
    progress: Callable[[], Any] = lambda: None,
) -> list[str]:  # fmt: skip
    """Write the PNG files of a study and return their names.

    subtitle: a line that says of which model and text they are. tokens: T of them. traces: one of them has channels.
    head: the value head of the channels. progress: called after each picture.
    """
    names = []

    def draw(name, title, strips, draw_above=None):
        sheet = _Sheet(tokens, strips, draw_above is not None)
        sheet.text(0.14, title, fontsize=13, weight="bold")
        sheet.text(0.4, _drawable(subtitle, int(sheet.width / SUBTITLE_CHARACTER)), fontsize=9, color="0.3")
        if draw_above is not None:
            draw_above(sheet.axes(LEFT, TITLE + ABOVE_EXTRA, sheet.width - LEFT - RIGHT, DISTRIBUTION))
        _draw_bars(sheet)
        for start in sheet.starts:
            _draw_line(sheet, start)
        sheet.figure.savefig(folder / name)
        names.append(name)
        progress()

    norm = _log_norm(np.concatenate([trace.half_life.ravel() for trace in traces]))
    bar = "half-life in tokens, median over key channels"
    for name, title, strips_of, draw_above in (
        ("gates", "Erase and write gates", _gate_strips, None),
        ("memory", "What each token erases, writes and lets decay", _memory_strips, None),
        ("half_life", "Half-lives of the decay", lambda trace: [_layer_strip(trace, "half_life", norm, bar)],
         functools.partial(_draw_half_lives, traces)),
    ):  # fmt: skip
        strips = [strip for trace in traces for strip in strips_of(trace)]
        apart = len(traces) > 1 and _Sheet(tokens, strips, draw_above is not None).height > TALLEST
        if draw_above or not apart:
            draw(f"{name}.png", title, [] if apart else strips, draw_above)
        for trace in traces if apart else ():
            draw(f"{name}_layer_{trace.layer}.png", f"{title}, layer {trace.layer}", strips_of(trace))
    trace = next(trace for trace in traces if trace.channels is not None)
    title = f"Channels of layer {trace.layer}, value head {head}"
    draw("channels.png", title, _channel_strips(trace.channels, trace.erase_scale))
    return names
