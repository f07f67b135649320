"""Answers without a memory of one's own: what was said first, and what was said last, of what is asked for."""

import numpy as np
from torchtitan.components.loss import IGNORE_INDEX

from .dataset import TaskDataset
from .pairs import PairsTask

__all__ = ["RULES", "mentions", "score_rules"]

RULES = ("first mention", "last mention")


def mentions(task: PairsTask, tokens: np.ndarray, labels: np.ndarray) -> dict[str, list[int]]:
    """{rule: the symbol that it answers at each label that is one, in order}, -1 where nothing was said. A mention is
    the asked symbol with a value right after it, or in ``alias`` with a key."""
    first, last, said = {}, {}, tokens.tolist()
    for symbol, following in zip(said[:-1], said[1:], strict=True):
        if following in task.said:
            first.setdefault(symbol, following)
            last[symbol] = following
    asked = tokens[labels != IGNORE_INDEX].tolist()
    return {rule: [known.get(symbol, -1) for symbol in asked] for rule, known in zip(RULES, (first, last), strict=True)}


def score_rules(task: PairsTask, length: int, seed: int, sequences: int) -> dict[str, dict[str, float]]:
    """{rule: {"accuracy": share of right answers, "exact": share of sequences without a wrong one}} over the first
    held-out sequences of that length and seed, those that a model is validated on."""
    data = TaskDataset(task, length, seed, held_out=True)
    right = {rule: [] for rule in RULES}
    for index in range(sequences):
        tokens, labels = data.sequence(index)
        answers = labels[labels != IGNORE_INDEX]
        for rule, found in mentions(task, tokens, labels).items():
            right[rule].append(np.array(found) == answers)
    return {
        rule: {"accuracy": float(np.concatenate(rows).mean()), "exact": float(np.mean([row.all() for row in rows]))}
        for rule, rows in right.items()
    }
