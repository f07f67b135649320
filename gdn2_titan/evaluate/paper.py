"""The tables 2 and 3 of the paper (arXiv 2605.22791): their columns, and the rows of its two GDN-2 models.

These are the figures of the models of 1.3B parameters, trained on 100B tokens of FineWeb-Edu. docs/evaluation.md says
where they were read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["AVERAGED", "CONTAINS", "LENGTHS", "PAPER", "PAPER_ROWS", "TABLE_2", "TABLE_3", "Column", "needle_column"]

PAPER = "paper"  # what all tasks of both tables are asked for by
CONTAINS = "contains"  # the metric of the needle tasks


@dataclass(frozen=True)
class Column:
    """Where a column's figure comes from: task and metric as lm-eval, or ``needles``, names them."""

    head: str
    task: str
    metric: str
    length: int | None = None  # tokens, of a needle task


TABLE_2 = (
    Column("Wiki ppl", "wikitext", "word_perplexity"),
    Column("LMB ppl", "lambada_openai", "perplexity"),
    Column("LMB acc", "lambada_openai", "acc"),
    Column("PIQA", "piqa", "acc"),
    Column("Hella acc_n", "hellaswag", "acc_norm"),
    Column("Wino", "winogrande", "acc"),
    Column("ARC-e", "arc_easy", "acc"),
    Column("ARC-c", "arc_challenge", "acc"),
    Column("OBQA", "openbookqa", "acc"),
    Column("SIQA", "social_iqa", "acc"),
    Column("BoolQ", "boolq", "acc"),
)
# The table's last column is the mean of its accuracies.
AVERAGED = TABLE_2[2:]
# Tokens of the contexts that table 3 has.
LENGTHS = {
    "s-niah-1": (1024, 2048, 4096, 8192), "s-niah-2": (1024, 2048, 4096, 8192),
    "s-niah-3": (1024, 2048, 4096), "mk-niah-1": (1024, 2048, 4096),
}  # fmt: skip


def needle_column(task: str, length: int) -> Column:
    """Of a needle task with contexts of ``length`` tokens."""
    size = f"{length:,}" if length % 1024 else f"{length // 1024}K"
    return Column(f"{task.upper()} {size}", task, CONTAINS, length)


TABLE_3 = tuple(needle_column(task, length) for task, lengths in LENGTHS.items() for length in lengths)

_RECURRENT, _HYBRID = "GDN-2 1.3B (paper)", "GDN-2 1.3B hybrid (paper)"
_ROWS_2 = {
    _RECURRENT: (15.90, 11.41, 48.09, 72.80, 56.84, 57.85, 72.43, 38.23, 31.60, 40.58, 59.54),
    _HYBRID: (15.62, 10.43, 50.90, 72.20, 58.46, 58.56, 71.89, 36.69, 33.00, 41.50, 62.57),
}
_ROWS_3 = {
    _RECURRENT: (100.0, 100.0, 100.0, 97.8, 100.0, 100.0, 93.0, 39.2, 92.0, 89.8, 31.8, 72.6, 51.4, 37.8),
    _HYBRID: (100.0, 100.0, 55.2, 27.4, 100.0, 100.0, 57.9, 29.2, 99.6, 99.0, 55.6, 93.0, 84.6, 48.0),
}
# {name of the model: {column: figure}}; perplexities as they are, all others in percent.
PAPER_ROWS: Mapping[str, Mapping[Column, float]] = {
    name: dict(zip((*TABLE_2, *TABLE_3), (*_ROWS_2[name], *_ROWS_3[name]), strict=True))
    for name in (_RECURRENT, _HYBRID)
}
