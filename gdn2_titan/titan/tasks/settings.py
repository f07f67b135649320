"""The task that a job config asks for, the conditions it is validated under, and what is refused."""

import dataclasses

from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.sections import section

from .copying import Copying
from .mqar import MQAR
from .needle import Needle
from .overwrite import Overwrite
from .parity import Parity
from .permutations import Permutations
from .selective_erase import SelectiveErase
from .task import Task

__all__ = ["TASKS", "Condition", "check_task", "conditions", "task_of", "training_condition", "validation_lengths"]

TASKS: dict[str, type[Task]] = {
    cls.name: cls for cls in (MQAR, Overwrite, SelectiveErase, Needle, Parity, Permutations, Copying)
}

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
    def settings(self):
        """{"pairs": 16, "length": 256}, or without a size."""
        sizes = self.task.sizes
        return ({} if sizes is None else {sizes: getattr(self.task, sizes)[0]}) | {"length": self.length}

    def __str__(self):
        return ",".join(f"{name}={value}" for name, value in self.settings.items())

    def check_length(self):
        """Raise ConfigError if the length is too short, or leaves too little variety for two splits."""
        task, settings = self.task, f"training.dataset = {self.task.name!r}"
        if self.size_field:
            settings += f" and {self.size_field} = {getattr(task, task.sizes)}"
        if self.length < task.shortest():
            raise ConfigError(
                f"{self.length_field} is {self.length}; with {settings} it must be at least {task.shortest()}"
            )
        contents = task.contents(self.length)
        if contents < FEWEST_CONTENTS:
            raise ConfigError(
                f"{self.length_field} is {self.length}; with {settings} there are {contents} different things to "
                f"remember, which must be at least {FEWEST_CONTENTS} to have some for training, others for validation"
            )


def _fields(cls):
    """The fields of [task] that a task takes."""
    own = [field.name for field in dataclasses.fields(cls)]
    return own + ["seed"] + ([f"validation_{cls.sizes}"] if cls.sizes else []) + ["validation_lengths"]


def _set(job_config):
    """The fields of [task] that the config sets."""
    return {name: value for name, value in vars(section(job_config, "task")).items() if value is not None}


def task_of(job_config):
    """The task to train on, or None where training.dataset is none. Unchecked."""
    cls = TASKS.get(job_config.training.dataset)
    if cls is None:
        return None
    own = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in _set(job_config).items() if name in own})


def training_condition(job_config):
    """The Condition that training.dataset is trained under, or None where it is no task."""
    task = task_of(job_config)
    if task is None:
        return None
    return Condition(task, job_config.training.seq_len, "training.seq_len", task.sizes and f"task.{task.sizes}")


def conditions(job_config):
    """The Conditions that training.dataset is validated under; none unless validation.dataset is the same task."""
    task, settings = task_of(job_config), section(job_config, "task")
    validation = job_config.validation
    if task is None or not validation.enable or validation.dataset != task.name:
        return []
    size_field = task.sizes and f"task.{task.sizes}"
    if task.sizes and (sizes := getattr(settings, f"validation_{task.sizes}")):
        task, size_field = dataclasses.replace(task, **{task.sizes: sizes}), f"task.validation_{task.sizes}"
    return [
        Condition(one, length, field, size_field)
        for one in task.each_size()
        for field, length in validation_lengths(job_config)
    ]


def validation_lengths(job_config):
    """[(name of the field, length)] of all lengths that sequences have in validation."""
    validation, lengths = job_config.validation, section(job_config, "task").validation_lengths
    if not validation.enable:
        return []
    if lengths and validation.dataset in TASKS:
        return [("task.validation_lengths", length) for length in lengths]
    return [("validation.seq_len", validation.seq_len)]


def check_task(job_config, vocab_size):
    """Raise ConfigError unless the tasks in the config, if any, can be trained on and validated with."""
    training, validation = job_config.training, job_config.validation
    dataset, task = training.dataset, task_of(job_config)
    takes = _fields(type(task)) if task else []
    for name, value in _set(job_config).items():
        if name not in takes:
            raise ConfigError(
                f"task.{name} is {value!r}; dataset {dataset!r} would ignore it; "
                + (f"it takes: {', '.join(takes)}" if task else f"allowed with: {', '.join(_takers(name))}")
            )
    if validation.enable and validation.dataset in TASKS and validation.dataset != dataset:
        raise ConfigError(
            f"validation.dataset is {validation.dataset!r}; a task is validated where it is trained: training.dataset "
            f"must be the same, and is {dataset!r}"
        )
    if task is None:
        return
    settings = section(job_config, "task")
    if settings.seed is not None and settings.seed < 0:
        raise ConfigError(f"task.seed is {settings.seed}; it must be 0 or more")
    _check(task, vocab_size)
    training_condition(job_config).check_length()
    if not validation.enable or validation.dataset != dataset:
        return
    if validation.steps == -1:
        raise ConfigError(
            f"validation.steps is -1; with validation.dataset = {dataset!r}, whose sequences have no end, it must be "
            "at least 1"
        )
    lengths = settings.validation_lengths
    if lengths and (min(lengths) < 1 or len(set(lengths)) < len(lengths)):
        raise ConfigError(f"task.validation_lengths is {lengths}; it must be a list of different numbers of at least 1")
    own_sizes = task.sizes and getattr(settings, f"validation_{task.sizes}")
    if own_sizes:
        _check(dataclasses.replace(task, **{task.sizes: own_sizes}), vocab_size, "validation_")
    for condition in conditions(job_config):
        condition.check_length()


def _takers(name):
    return [repr(task) for task, cls in TASKS.items() if name in _fields(cls)]


def _check(task, vocab_size, prefix=""):
    try:
        task.check(vocab_size)
    except ValueError as error:
        # The sentence begins with a field; sizes that are only validated have another name.
        prefix = prefix if task.sizes and str(error).startswith(f"{task.sizes} ") else ""
        raise ConfigError(f"task.{prefix}{error}") from error
