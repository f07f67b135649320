"""Results as the paper's tables: its columns, its rows, and a row of the model that was evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass

from .paper import AVERAGED, PAPER_ROWS, TABLE_2, TABLE_3, Column, needle_column

__all__ = ["Result", "mean", "text_of"]

NONE = "-"


@dataclass(frozen=True)
class Result:
    """One figure. Accuracies are in percent, perplexities and others as they are."""

    task: str
    metric: str
    length: int | None  # tokens of the context, of a needle task
    value: float | None  # None where it is not finite
    stderr: float | None
    n: int | None  # documents or prompts


def _of(column: Column, results: Sequence[Result]) -> Result | None:
    key = column.task, column.metric, column.length
    return next((result for result in results if (result.task, result.metric, result.length) == key), None)


def mean(results: Sequence[Result]) -> float | None:
    """Table 2's last column: the mean of its nine accuracies, None where one is missing."""
    values = [result and result.value for result in (_of(column, results) for column in AVERAGED)]
    return None if None in values else sum(values) / len(values)


def _figure(value, column=None):
    if value is None:
        return NONE
    if abs(value) >= 1e6:  # the perplexity of a model that learned little
        return f"{value:.1e}"
    return f"{value:.1f}" if column is not None and column.length else f"{value:.2f}"


def _table(columns: Sequence[Column], results: Sequence[Result], name: str, with_mean: bool) -> list[list[str]]:
    """Head and rows: the paper's, the model's, its standard errors and its numbers of samples."""
    found = [_of(column, results) for column in columns]
    pairs = list(zip(found, columns, strict=True))
    rows = [["", *(column.head for column in columns)]]
    rows += [
        [model, *(_figure(paper.get(column), column) for column in columns)] for model, paper in PAPER_ROWS.items()
    ]
    rows += [
        [name, *(_figure(result.value, column) for result, column in pairs)],
        ["standard error", *(_figure(result.stderr, column) for result, column in pairs)],
        ["n", *(NONE if result.n is None else f"{result.n:,}" for result in found)],
    ]
    if with_mean:
        averages = [sum(paper[column] for column in AVERAGED) / len(AVERAGED) for paper in PAPER_ROWS.values()]
        for row, cell in zip(rows, ("Avg", *map(_figure, (*averages, mean(results), None, None))), strict=True):
            row.append(cell)
    return rows


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns stand below each other as plain text, too."""
    widths = [max(2, *map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    cells = [[row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in rows]
    cells.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def text_of(results: Sequence[Result], left_out: Sequence[str], name: str) -> str:
    """The tables, with those columns that there are results for, other results by name, and the sentences that say why
    something is not there."""
    needles = [needle_column(result.task, result.length) for result in results if result.length is not None]
    tables = {
        "Table 2: language modelling and commonsense": TABLE_2,
        "Table 3: needles in a haystack, % found": dict.fromkeys((*TABLE_3, *needles)),
    }
    parts, shown = [], []
    for title, columns in tables.items():
        if columns := [column for column in columns if _of(column, results)]:
            rows = _table(columns, results, name, with_mean=any(column in AVERAGED for column in columns))
            parts.append(f"{title}\n\n{_markdown(rows)}")
            shown += [_of(column, results) for column in columns]
    if others := [result for result in results if result not in shown]:
        rows = [["", "metric", "value", "standard error", "n"]]
        for result in others:
            count = NONE if result.n is None else f"{result.n:,}"
            rows.append([result.task, result.metric, _figure(result.value), _figure(result.stderr), count])
        parts.append(f"Other figures\n\n{_markdown(rows)}")
    if mean(results) is None and any(_of(column, results) for column in AVERAGED):
        left_out = [*left_out, "The average is that of the table's nine accuracies, of which some are missing."]
    return "\n\n".join([*parts, *left_out])
