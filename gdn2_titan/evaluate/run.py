"""Runs the tasks of a command line on its model, and says and writes what comes out."""

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

import gdn2_titan
from gdn2_titan.convert.atomic import write_text
from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.convert.hf import load_checkpoint
from gdn2_titan.convert.tokenizer import document_ids, encode
from gdn2_titan.model_options import dtype_of, open_model

from .answers import greedy_answers
from .needles import NEEDLE_TASKS, NEW_TOKENS, contains, needle_prompts
from .paper import CONTAINS, LENGTHS, PAPER, PAPER_ROWS
from .report import Result, mean, text_of

__all__ = ["needle_result", "run"]


class LmEvalMissing(ConvertError):
    """The package is not installed; what needs it is left out."""


def needle_result(
    task: str, length: int, options: argparse.Namespace, haystack: str | None,
    tokens: Callable[[str], list[int]], before: list[int], answers: Callable[[list[list[int]]], list[str]],
) -> Result:  # fmt: skip
    """The share of prompts that are answered right, in percent.

    tokens: the ids of a text; before: those that begin a document. answers: from prompts' ids to what follows them.
    """
    drawn = needle_prompts(task, length, options.samples, options.seed, haystack or "", tokens, len(before))
    prompts = list(drawn)
    said = answers([before + prompt.ids for prompt in prompts])
    share = sum(map(contains, prompts, said)) / len(prompts)
    error = 100 * math.sqrt(share * (1 - share) / (len(prompts) - 1)) if len(prompts) > 1 else None
    return Result(task, CONTAINS, length, 100 * share, error, len(prompts))


def run(options: argparse.Namespace, tasks: list[str], haystack: str | None) -> None:
    """Print the tables to stdout and what is under way to stderr, and write the file after each task.

    Raises:
        ConvertError: one sentence about what is wrong with the options or the checkpoint, or if nothing could be run.
    """
    checkpoint, tokenizer = open_model(options)
    vocab_size = checkpoint.info.model_args.vocab_size
    before = document_ids(tokenizer, [], vocab_size)[0].tolist()
    tokens = _tokens(tokenizer, vocab_size)
    model = load_checkpoint(checkpoint, dtype_of(options), options.device)
    answers = greedy_answers(model, tokenizer, options.batch_size, NEW_TOKENS)
    harness = functools.cache(lambda: _harness(model, tokenizer, tokens, before, options))
    _refuse_unknown(options.tasks, harness)
    about = _about(options, checkpoint.step, model, haystack)
    results, missing = [], {}
    for task, length in _jobs(tasks, options.lengths):
        if length is not None and haystack is None and not NEEDLE_TASKS[task].noise:
            missing.setdefault("--haystack names no text to hide needles in", []).append(task)
            continue
        label, start = task if length is None else f"{task} at {length:,} tokens", time.perf_counter()
        try:
            if length is None:
                found = harness().run(task)
            else:
                found = [needle_result(task, length, options, haystack, tokens, before, answers)]
        except ConvertError as error:
            missing.setdefault(str(error), []).append(label)
            continue
        results += found
        print(f"{label}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
        _write(options.output, about, results, _sentences(missing))
    sentences = _sentences(missing)
    if not results:
        raise ConvertError(" ".join(sentences).removesuffix("."))
    _write(options.output, about, results, sentences)
    print(text_of(results, sentences, Path(options.model).resolve().name))


def _refuse_unknown(names, harness):
    """Names that were asked for, before anything has run for hours."""
    for name in names:
        if name == PAPER or name in NEEDLE_TASKS:
            continue
        with contextlib.suppress(LmEvalMissing):
            if name not in harness():
                needles = ", ".join(NEEDLE_TASKS)
                raise ConvertError(f"--tasks has {name}; it must be '{PAPER}', {needles} or a task of lm-eval's")


def _jobs(tasks, lengths):
    """(task, tokens of its contexts), None for lm-eval's."""
    for task in tasks:
        for length in (lengths or LENGTHS[task]) if task in NEEDLE_TASKS else (None,):
            yield task, length


def _tokens(tokenizer, vocab_size):
    def tokens(text):
        ids = encode(tokenizer, text)["input_ids"]
        if max(ids, default=0) >= vocab_size:
            raise ConvertError(
                f"the tokenizer gives id {max(ids)}; it must be below the model's vocab_size, {vocab_size}"
            )
        return ids

    return tokens


def _harness(model, tokenizer, tokens, before, options):
    try:
        from .harness import DocumentLM, Harness
    except ImportError as error:
        raise LmEvalMissing(
            f"{error}; lm-eval's tasks need the extra 'eval': pip install 'gdn2_titan[eval]'"
        ) from error
    lm = DocumentLM(model, tokenizer, tokens, before, options.batch_size, options.max_length)
    return Harness(lm, options.include_path, options.limit)


def _sentences(missing):
    """{reason: tasks that are left out for it} as sentences."""
    return [
        f"{', '.join(dict.fromkeys(tasks))} {'is' if len(set(tasks)) == 1 else 'are'} left out: {reason}."
        for reason, tasks in missing.items()
    ]


def _about(options, step, model, haystack):
    """What a reader of the figures wants to know of how they were made."""
    versions = {"gdn2_titan": gdn2_titan.__version__, "torch": torch.__version__}  # which build, too
    for name in ("transformers", "lm_eval", "datasets"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    if haystack is not None:
        digest = hashlib.sha256(haystack.encode()).hexdigest()
        settings["haystack"] = {"file": options.haystack, "characters": len(haystack), "sha256": digest}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    return {"step": step, "parameters": parameters, "dtype": dtype, "settings": settings, "versions": versions}


def _write(path, about, results, left_out):
    if path is None:
        return
    paper = {
        model: [asdict(column) | {"value": value} for column, value in row.items()] for model, row in PAPER_ROWS.items()
    }
    content = about | {
        "results": [asdict(result) for result in results],
        "average": mean(results),
        "left_out": left_out,
        "paper": paper,
    }
    write_text(path, json.dumps(content, indent=1) + "\n")
