"""Tasks of EleutherAI's lm-evaluation-harness on a model that is loaded already."""

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from gdn2_titan.convert.errors import ConvertError

from .report import Result

__all__ = ["DocumentLM", "Harness"]

# Resamplings that the standard error of a perplexity comes from; lm-eval's own 100,000 take minutes a task.
BOOTSTRAPS = 1000
FEWSHOT_SEED = 1234  # lm-eval's default
# Metrics between 0 and 1, which the paper's tables have in percent.
SHARES = ("acc", "acc_norm", "acc_mutual_info", "exact_match", "em", "f1", "contains")
# Words that lm-eval puts among a task's metrics.
NO_METRICS = ("alias", "name", "sample_len", "sample_count")


class DocumentLM(HFLM):
    """A model to which each text is a document as in training: ``before`` it, once, the ids that begin one, and what
    the text says is text. lm-eval leaves both to the tokenizer's settings, and begins a document of ``wikitext`` with
    bos twice where a tokenizer adds it."""

    def __init__(
        self, model: Any, tokenizer: Any, tokens: Callable[[str], list[int]], before: Sequence[int], batch_size: int,
        max_length: int,
    ) -> None:  # fmt: skip
        """tokens: the ids of a text. before: may be empty; eos stands in for it then, as lm-eval has it.

        Raises:
            ConvertError: the tokenizer has nothing that a document could begin with.
        """
        if not before and tokenizer.eos_token_id is None:
            raise ConvertError("the tokenizer has neither bos nor eos; lm-eval's tasks need one that begins a document")
        self._tokens, self._before = tokens, list(before)
        super().__init__(
            pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, max_length=max_length,
            prefix_token_id=before[-1] if before else tokenizer.eos_token_id,
        )  # fmt: skip

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        return self._tokens(string)[-(left_truncate_len or 0) :]

    def _encode_pair(self, context, continuation):
        context, continuation = super()._encode_pair(context, continuation)
        return self._before + context, continuation

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        rows = [(self._before + self.tok_encode(string))[-(left_truncate_len or 0) :] for string in strings]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(longest - len(row), None) if padding_side == "left" else slice(len(row))
            ids[number, place], mask[number, place] = torch.tensor(row), 1
        return ids, mask


class Harness:
    """lm-eval's tasks by name, each loaded and run by itself.

    Args:
        lm: the model.
        include_path: folder of YAML files with tasks of one's own. One with the name of an lm-eval task replaces it.
        limit: documents of each task, from its first on; None for all.
    """

    def __init__(self, lm: DocumentLM, include_path: str | None, limit: int | None) -> None:
        self._lm, self._limit = lm, limit
        # Tasks that make documents of a length ask for the tokenizer's name.
        self._options = {"include_path": include_path, "metadata": {"tokenizer": lm.tokenizer.name_or_path}}
        self._own = TaskManager(include_defaults=False, **self._options) if include_path else None
        self._all = None

    def _manager(self, name):
        """The index of lm-eval's own tasks is read when it is needed: that takes seconds."""
        if self._own is not None and name in self._own.all_tasks:
            return self._own
        if self._all is None:
            self._all = TaskManager(**self._options)
        return self._all

    def __contains__(self, name: str) -> bool:
        """Whether there is such a task, group or tag."""
        return name in self._manager(name).all_tasks

    def run(self, name: str) -> list[Result]:
        """The results of a task, or of all tasks of a group or tag.

        Raises:
            ConvertError: its data, or a package that it needs, are not to be had.
        """
        try:
            tasks = self._manager(name).load([name])
        # Datasets, hubs, scripts and packages of others: what a task needs that is not here, it says in its own way.
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConvertError(f"the data cannot be loaded here: {reason}") from error
        for task in tasks["tasks"].values():  # as lm-eval's own command line has it
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        with contextlib.redirect_stdout(sys.stderr):  # what it says on the way
            found = evaluator.evaluate(
                self._lm, tasks, limit=self._limit, bootstrap_iters=BOOTSTRAPS, log_samples=False
            )
        results = []
        for task, values in found["results"].items():
            count = found["n-samples"].get(task, {}).get("effective")
            for key, value in values.items():
                if key in NO_METRICS or "_stderr" in key or not isinstance(value, int | float):
                    continue
                metric, _, chosen = key.partition(",")
                factor = 100 if metric in SHARES else 1
                error = values.get(f"{metric}_stderr,{chosen}")
                name = metric if chosen in ("", "none") else key
                results.append(Result(task, name, None, _number(value, factor), _number(error, factor), count))
        return results


def _number(value, factor):
    """None for what is no number, as lm-eval's "N/A", or not a finite one."""
    return value * factor if isinstance(value, int | float) and math.isfinite(value) else None
