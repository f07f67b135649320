"""The task that a job config asks for, the conditions it is validated under, and what is refused."""

import dataclasses
from typing import Any

from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.settings import Settings

from .copying import Copying
from .histories import Alias, Locked, Rejected, Stale, Version
from .needle import Needle
from .pairs import MQAR, Overwrite, SelectiveErase
from .state_tracking import Parity, Permutations
from .task import Task

__all__ = ["TASKS", "Condition", "check_task", "conditions", "task_of", "training_condition", "validation_lengths"]

TASKS: dict[str, type[Task]] = {
    cls.name: cls
    for cls in (
        MQAR, Overwrite, SelectiveErase, Stale, Rejected, Locked, Alias, Version, Needle, Parity, Permutations, Copying,
    )
}  # fmt: skip

# With fewer different contents one of the splits might have none.
FEWEST_CONTENTS = 256


@dataclasses.dataclass
class Condition:
    """A task and the length of its sequences; in validation the task has one size."""

    task: Task
    length: int
    length_field: str
    """The field that says so, for messages"""
    size_field: str | None = None
    """The field that says how much is to be remembered"""

    @property
    def settings(self) -> dict[str, int]:
        """{"pairs": 16, "length": 256}, or without a size."""
        sizes = self.task.sizes
        return ({} if sizes is None else {sizes: getattr(self.task, sizes)[0]}) | {"length": self.length}

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.settings.items())

    def check_length(self) -> None:
        """Raise ConfigError if the length is too short, or leaves too little variety for two splits."""
        task, said = self.task, f"training.dataset = {self.task.name!r}"
        if self.size_field:
            said += f" and {self.size_field} = {getattr(task, task.sizes)}"
        if self.length < task.shortest():
            raise ConfigError(
                f"{self.length_field} is {self.length}; with {said} it must be at least {task.shortest()}"
            )
        contents = task.contents(self.length)
        if contents < FEWEST_CONTENTS:
            raise ConfigError(
                f"{self.length_field} is {self.length}; with {said} there are {contents} different things to "
                f"remember, which must be at least {FEWEST_CONTENTS} to have some for training, others for validation"
            )


def _fields(cls: type[Task]) -> list[str]:
    """The fields of [task] that a task takes."""
    own = [field.name for field in dataclasses.fields(cls)]
    return own + ["seed"] + ([f"validation_{cls.sizes}"] if cls.sizes else []) + ["validation_lengths"]


def _set(settings: Settings) -> dict[str, Any]:
    """The fields of [task] that the config sets."""
    return {name: value for name, value in vars(settings.task).items() if value is not None}


def task_of(settings: Settings) -> Task | None:
    """The task to train on, or None where training.dataset is none. Unchecked."""
    if (cls := TASKS.get(settings.training.dataset)) is None:
        return None
    return cls(**{f.name: x for f in dataclasses.fields(cls) if (x := getattr(settings.task, f.name)) is not None})


def training_condition(settings: Settings) -> Condition | None:
    """The Condition that training.dataset is trained under, or None where it is no task."""
    if (task := task_of(settings)) is None:
        return None
    return Condition(task, settings.training.seq_len, "training.seq_len", task.sizes and f"task.{task.sizes}")


def conditions(settings: Settings) -> list[Condition]:
    """The Conditions that training.dataset is validated under; none unless validation.dataset is the same task."""
    task, section = task_of(settings), settings.task
    validation = settings.validation
    if task is None or not validation.enable or validation.dataset != task.name:
        return []
    size_field = task.sizes and f"task.{task.sizes}"
    if task.sizes and (sizes := getattr(section, f"validation_{task.sizes}")):
        task, size_field = dataclasses.replace(task, **{task.sizes: sizes}), f"task.validation_{task.sizes}"
    return [
        Condition(one, length, field, size_field)
        for one in task.each_size()
        for field, length in validation_lengths(settings)
    ]


def validation_lengths(settings: Settings) -> list[tuple[str, int]]:
    """[(name of the field, length)] of all lengths that sequences have in validation."""
    validation, lengths = settings.validation, settings.task.validation_lengths
    if not validation.enable:
        return []
    if lengths and validation.dataset in TASKS:
        return [("task.validation_lengths", length) for length in lengths]
    return [("validation.seq_len", validation.seq_len)]


def check_task(settings: Settings, vocab_size: int) -> None:
    """Raise ConfigError unless the tasks in the config, if any, can be trained on and validated with."""
    training, validation = settings.training, settings.validation
    dataset, task = training.dataset, task_of(settings)
    takes = _fields(type(task)) if task else []
    for name, value in _set(settings).items():
        if name not in takes:
            raise ConfigError(
                f"task.{name} is {value!r}; dataset {dataset!r} would ignore it; "
                + (f"it takes: {', '.join(takes)}" if task else f"allowed with: {', '.join(_takers(name))}")
            )
    if validation.enable and validation.dataset in TASKS and validation.dataset != dataset:
        raise ConfigError(f"validation.dataset is {validation.dataset!r}; a task is validated where it is trained: "
                          f"training.dataset must be the same, and is {dataset!r}")  # fmt: skip
    if task is None:
        return
    section = settings.task
    if section.seed is not None and section.seed < 0:
        raise ConfigError(f"task.seed is {section.seed}; it must be 0 or more")
    _check(task, vocab_size)
    training_condition(settings).check_length()
    if not validation.enable or validation.dataset != dataset:
        return
    if validation.steps == -1:
        raise ConfigError(f"validation.steps is -1; with validation.dataset = {dataset!r}, whose sequences have no "
                          "end, it must be at least 1")  # fmt: skip
    lengths = section.validation_lengths
    if lengths and (min(lengths) < 1 or len(set(lengths)) < len(lengths)):
        raise ConfigError(f"task.validation_lengths is {lengths}; it must be a list of different numbers of at least 1")
    own_sizes = task.sizes and getattr(section, f"validation_{task.sizes}")
    if own_sizes:
        _check(dataclasses.replace(task, **{task.sizes: own_sizes}), vocab_size, "validation_")
    for condition in conditions(settings):
        condition.check_length()


def _takers(name: str) -> list[str]:
    return [repr(task) for task, cls in TASKS.items() if name in _fields(cls)]


def _check(task: Task, vocab_size: int, prefix: str = "") -> None:
    try:
        task.check(vocab_size)
    except ValueError as error:
        # The sentence begins with a field; sizes that are only validated have another name.
        prefix = prefix if task.sizes and str(error).startswith(f"{task.sizes} ") else ""
        raise ConfigError(f"task.{prefix}{error}") from error
