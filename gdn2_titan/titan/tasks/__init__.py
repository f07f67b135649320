"""Recall tasks: datasets whose sequences say something and ask for it, with exactly one right answer."""

from .dataset import TaskDataset
from .rules import mentions, score_rules
from .settings import TASKS, Condition, check_task, conditions, task_of, training_condition, validation_lengths

__all__ = [
    "TASKS", "Condition", "TaskDataset", "check_task", "conditions", "mentions", "score_rules", "task_of",
    "training_condition", "validation_lengths",
]  # fmt: skip
