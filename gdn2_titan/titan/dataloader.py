"""TorchTitan's data loaders over packed text and recall tasks."""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple, NoReturn

from datasets import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

from gdn2_titan.titan.corpus import load_source
from gdn2_titan.titan.errors import ConfigError, refusing
from gdn2_titan.titan.packing import PackedText
from gdn2_titan.titan.settings import Settings
from gdn2_titan.titan.tasks import Condition, TaskDataset, training_condition
from gdn2_titan.titan.token_cache import tokens_of_files
from gdn2_titan.titan.tokens import of_plain_text


class ReshardingDataloader(ParallelAwareDataloader):
    """TorchTitan's loader, which can also resume with another number of data-parallel ranks where that is exact.

    Without loader workers, the state of a map-style source, or of a task, is the same on every rank (see
    :class:`PackedText` and :class:`TaskDataset`): it is saved once, and any number of ranks continues from it.
    Otherwise TorchTitan's rule stands: the same number of ranks.
    """

    ends_process = False
    """Whether a ConfigError while reading ends the process: see :func:`for_trainer`."""

    def __init__(self, dataset: PackedText | TaskDataset, dp_rank: int, dp_world_size: int, **kwargs: Any) -> None:
        super().__init__(dataset, dp_rank, dp_world_size, **kwargs)
        self._one_state = dataset.same_state_on_all_ranks and self.num_workers == 0
        if self._one_state:
            self._rank_id = "all_dp_ranks"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict and self._one_state:
            state_dict = {**state_dict, "world_size": self.dp_world_size}
        if self._rank_id in state_dict:
            self._check_place(state_dict["world_size"], pickle.loads(state_dict[self._rank_id]))
        super().load_state_dict(state_dict)

    def _check_place(self, ranks: int, place: dict[str, Any]) -> None:
        """A place in the data that each rank or loader worker has for itself is of as many of them."""
        workers = place["_snapshot"]["_main_snapshot"]["_num_workers"] if "_snapshot" in place else 0
        if (ranks, workers) != (self.dp_world_size, self.num_workers):
            self._end(ConfigError(
                f"the checkpoint's place in the data is of {ranks} data-parallel ranks with {workers} loader workers "
                f"each, and there are {self.dp_world_size} with {self.num_workers} now; it must be as many, or start "
                "the data anew with --checkpoint.exclude_from_loading dataloader."
            ))  # fmt: skip

    def _end(self, error: ConfigError) -> NoReturn:
        if self.ends_process:
            raise SystemExit(f"Config error: {error}") from error
        raise error

    def __iter__(self) -> Iterator[Any]:
        # Not a generator itself: TorchTitan may ask for the state before the first batch.
        return self._batches(super().__iter__())

    def _batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except ConfigError as error:
            # One that a loader worker sends has the worker's traceback around its sentence.
            self._end(ConfigError(str(error).rpartition("ConfigError: ")[2].strip()))
        if self.dataset.infinite:  # other ranks would wait for this one
            self._end(ConfigError(
                f"the stream has no document with text for data-parallel rank {self.dp_rank} of {self.dp_world_size}; "
                "allowed: more documents, or fewer data-parallel ranks."
            ))  # fmt: skip


def for_trainer(build: Callable[..., ReshardingDataloader]) -> Callable[..., ReshardingDataloader]:
    """A builder of loaders whose ConfigError, also that of a document met in the middle of a run, ends the process with
    its sentence instead of a traceback."""

    @refusing
    def built(*args: Any, **kwargs: Any) -> ReshardingDataloader:
        loader = build(*args, **kwargs)
        loader.ends_process = True
        return loader

    return built


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: Settings | Any, infinite: bool = True
) -> ReshardingDataloader:
    """The loader of training batches: ``training.*``, ``data.*`` and ``gdn2.document_resets`` of the configuration.

    Yields ``({"input": int64 [B, T], "resets": bool [B, T]}, labels int64 [B, T])``, B = ``training.local_batch_size``,
    T = ``training.seq_len``; without ``"resets"`` if ``gdn2.document_resets`` is false, and for a recall task. A last
    incomplete batch is dropped.

    Raises:
        ConfigError: if the source of documents cannot be used.
    """
    settings, ranks = Settings.of(job_config), _Ranks(dp_rank, dp_world_size)
    if (condition := training_condition(settings)) is not None:
        return _of_task("training", condition, ranks, tokenizer, settings)
    return _of_text("training", ranks, tokenizer, settings, infinite)


def build_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: Settings | Any, infinite: bool = False
) -> ReshardingDataloader:
    """The loader of validation batches: like :func:`build_dataloader`, from ``validation.*``.

    Each ``iter()`` of it gives the same batches from the first on, so that losses of different steps compare.

    Raises:
        ConfigError: if the source of documents cannot be used, or if a single pass over a stream is asked for on more
            than one rank, where ranks run out at different times and the others would wait for ever.
    """
    return _of_text("validation", _Ranks(dp_rank, dp_world_size), tokenizer, Settings.of(job_config), infinite)


def build_task_dataloader(
    condition: Condition, dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: Settings | Any
) -> ReshardingDataloader:
    """The loader of held-out sequences of a recall task under one condition, in batches of
    ``validation.local_batch_size``, without end and without resets; the same ones at each ``iter()``.

    Raises:
        ConfigError: if with this tokenizer the length is too short.
    """
    ranks = _Ranks(dp_rank, dp_world_size)
    return _of_task("validation", condition, ranks, tokenizer, Settings.of(job_config))


class _Ranks(NamedTuple):
    dp_rank: int
    dp_world_size: int


def _of_task(
    part: str, condition: Condition, ranks: _Ranks, tokenizer: BaseTokenizer, settings: Settings
) -> ReshardingDataloader:
    section, held_out = getattr(settings, part), part == "validation"
    condition.task.prepare(of_plain_text(tokenizer), held_out)
    condition.check_length()
    seed, batch_size = settings.task.seed or 0, section.local_batch_size
    sequences = TaskDataset(
        condition.task, condition.length, seed, held_out=held_out, batch_size=batch_size, **ranks._asdict()
    )
    return _loader(sequences, section, ranks)


def _of_text(
    part: str, ranks: _Ranks, tokenizer: BaseTokenizer, settings: Settings, infinite: bool
) -> ReshardingDataloader:
    section, data, held_out = getattr(settings, part), settings.data, part == "validation"
    if section.dataset == "files" and isinstance(tokenizer, HuggingFaceTokenizer):
        source = tokens_of_files(part, section.dataset_path, data, tokenizer)
    else:
        source = load_source(
            part, section.dataset, section.dataset_path, held_out=held_out, text_column=data.text_column,
            hf_subset=data.hf_subset, hf_split=data.hf_validation_split if held_out else data.hf_split,
        )  # fmt: skip
    streaming = isinstance(source, IterableDataset)
    if streaming and not infinite and ranks.dp_world_size > 1:
        raise ConfigError(
            f"{part}.dataset = {section.dataset!r} is a stream, which {ranks.dp_world_size} data-parallel ranks cannot "
            "read once to the end in step; allowed: reading it without end, for validation with validation.steps > 0."
        )
    packed = PackedText(
        source, of_plain_text(tokenizer), section.seq_len, batch_size=section.local_batch_size, infinite=infinite,
        with_resets=settings.gdn2.document_resets, text_column=data.text_column if streaming else "text",
        shuffle_seed=data.shuffle_seed, **ranks._asdict(),
    )  # fmt: skip
    return _loader(packed, section, ranks)


def _loader(dataset: PackedText | TaskDataset, section: Any, ranks: _Ranks) -> ReshardingDataloader:
    # An incomplete batch would change the shapes that compiled and pipelined models were built for.
    options = asdict(section.dataloader) | {"batch_size": section.local_batch_size, "drop_last": True}
    return ReshardingDataloader(dataset, *ranks, **options)
