"""Small models of one shape trained side by side: their parameters stacked, their steps one call.

M models, that may differ in seed, learning rate and task, B sequences of T tokens each, at most A answers in a batch.
Each is trained as TorchTitan trains it alone, to rounding: the same initial values, sequences, AdamW, clipping and
schedule.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchtitan.components.loss import IGNORE_INDEX

from gdn2_titan.models import GDN2Model
from gdn2_titan.titan.optimizer import is_decayed
from gdn2_titan.titan.settings import Settings
from gdn2_titan.titan.tasks import Condition, TaskDataset, conditions, training_condition

from .folding import fold_models

__all__ = ["Batch", "Member"]


class Member(NamedTuple):
    """A model, with its initial values, and the settings that it is trained by."""

    model: GDN2Model
    settings: Settings


class State(NamedTuple):
    """Of all models: parameters by name [M, ...], and AdamW's two means of them."""

    parameters: dict[str, Tensor]
    mean: dict[str, Tensor]
    square: dict[str, Tensor]


class Batch:
    """Members of one shape, whose settings are alike but for task, seed and learning rate.

    checkpoint: a file that tells how far a killed training had come, written every ``interval`` steps.
    """

    def __init__(self, members: list[Member], checkpoint: Path, *, compile: bool, interval: int = 250) -> None:
        fold_models()
        self._settings = [member.settings for member in members]
        self._checkpoint, self._interval, self._compile = checkpoint, interval, compile
        stacked, _ = stack_module_state([member.model for member in members])
        stacked = {name: x.detach() for name, x in stacked.items()}
        self._state = State(stacked, *({name: torch.zeros_like(x) for name, x in stacked.items()} for _ in range(2)))
        self._model = members[0].model
        self._head, self._model.lm_head = self._model.lm_head, None
        self._decayed = {name for name, p in members[0].model.named_parameters() if is_decayed(name, p)}
        self._decayed.add("lm_head.weight")
        self._step, self._spent, self._began = 0, 0.0, _cpu_seconds()
        if checkpoint.exists():
            self._step, self._spent, *state = torch.load(checkpoint, weights_only=True)
            self._state = State(*state)

    def train(self, progress: Callable[[int], Any] = lambda steps: None) -> None:
        """Train to the end. progress: called with the number of steps that were done since the last call."""
        section = self._settings[0]
        steps, rates = section.training.steps, torch.tensor([s.optimizer.lr for s in self._settings])
        data = [_TrainingData(s) for s in self._settings]
        sources = {d.key: d for d in data}
        answers = max(_most_answers(s) for s in self._settings)
        advance = self._advance
        progress(self._step)
        while self._step < steps:
            rows = {key: source(self._step) for key, source in sources.items()}
            tokens, at, wanted = _batch([rows[d.key] for d in data], answers)
            rate = rates * _factor(section, self._step)
            count = torch.tensor(float(self._step + 1))
            if self._compile and advance == self._advance:
                advance = _compiled(self._advance, self._state, tokens, at, wanted, rate, count)
            with torch.set_grad_enabled(not self._compile):
                self._state = State(*advance(self._state, tokens, at, wanted, rate, count))
            self._step += 1
            progress(1)
            if self._step % self._interval == 0 and self._step < steps:
                part = self._checkpoint.with_suffix(".part")
                torch.save((self._step, self.cpu_seconds(), *self._state), part)
                os.replace(part, self._checkpoint)

    def cpu_seconds(self) -> float:
        """CPU time that this batch has taken so far, compilation and trainings before a kill included."""
        return self._spent + _cpu_seconds() - self._began

    def parameters(self, index: int) -> dict[str, Tensor]:
        """Those of a model, by name."""
        return {name: x[index] for name, x in self._state.parameters.items()}

    @torch.no_grad()
    def validate(self, first: int | None = None) -> list[list[dict[str, float]]]:
        """Of each model, or of that many first ones, under each of its conditions, what TorchTitan's validation has:
        size and length, accuracy, exact and loss."""
        chosen = self._settings[:first]
        asked = [(i, condition) for i, settings in enumerate(chosen) for condition in conditions(settings)]
        found = {}
        for length in sorted({condition.length for _, condition in asked}):
            alike = [place for place, (_, condition) in enumerate(asked) if condition.length == length]
            for start in range(0, len(alike), len(self._settings)):
                places = alike[start : start + len(self._settings)]
                found |= zip(places, self._score([asked[place] for place in places]), strict=True)
        results = [[] for _ in chosen]
        for place, (i, condition) in enumerate(asked):
            results[i].append(condition.settings | found[place])
        return results

    def _score(self, asked: list[tuple[int, Condition]]) -> list[dict[str, float]]:
        """Of models, by their indices, each under a condition, all of one length."""
        section = self._settings[0].validation
        size, count = section.local_batch_size, section.steps * section.local_batch_size
        indices, rows = [i for i, _ in asked], range(count)
        parameters = {name: x[indices] for name, x in self._state.parameters.items()}
        data = [_sequences(condition, self._settings[i], held_out=True) for i, condition in asked]
        most = size * max(condition.task.answers(condition.length) for _, condition in asked)
        wrong, answers, loss = torch.zeros(3, len(asked), count)
        for first in range(0, count, size):
            tokens, at, wanted = _batch(
                [_joined([d.sequence(n) for n in rows[first : first + size]]) for d in data], most
            )
            logits = vmap(self._logits)(parameters, tokens, at)  # [M, A, vocabulary]
            is_asked = wanted != IGNORE_INDEX
            missed = is_asked & (logits.argmax(-1) != wanted)
            losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
            whose = first + at // tokens.shape[2]  # the sequence that an answer is of
            for sums, of in ((wrong, missed), (answers, is_asked), (loss, losses)):
                sums.scatter_add_(1, whose, of * is_asked.float())
        right, exact = 1 - wrong.sum(1) / answers.sum(1), (wrong == 0).float().mean(1)
        names = ("accuracy", "exact", "loss")
        shares = zip(right.tolist(), exact.tolist(), (loss.sum(1) / answers.sum(1)).tolist(), strict=True)
        return [dict(zip(names, share, strict=True)) for share in shares]

    def _logits(self, parameters: dict[str, Tensor], tokens: Tensor, at: Tensor) -> Tensor:
        """Of one model at its answers only, places ``at`` [A] among all B * T: [A, vocabulary]."""
        head, rest = parameters["lm_head.weight"], {n: x for n, x in parameters.items() if n != "lm_head.weight"}
        with sdpa_kernel(SDPBackend.MATH):  # the one that PyTorch need not loop over the models for
            return functional_call(self._model, rest, (tokens,)).flatten(0, 1)[at] @ head.T

    def _loss(self, parameters: dict[str, Tensor], tokens: Tensor, at: Tensor, wanted: Tensor) -> Tensor:
        loss = F.cross_entropy(self._logits(parameters, tokens, at), wanted, reduction="sum")
        return loss / (wanted != IGNORE_INDEX).sum()

    def _advance(self, state, tokens, at, wanted, rate, count):
        """One step of AdamW of all models. rate [M]; count: steps, this one included."""
        with torch.enable_grad():
            parameters = {name: x.detach().requires_grad_() for name, x in state.parameters.items()}
            losses = vmap(self._loss)(parameters, tokens, at, wanted)
            grads = torch.autograd.grad(losses.sum(), list(parameters.values()))
        section, max_norm = self._settings[0].optimizer, self._settings[0].training.max_norm
        norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        first, second = 1 - section.beta1**count, 1 - section.beta2**count
        found = {}, {}, {}
        for (name, p), grad in zip(state.parameters.items(), grads, strict=True):
            shape = (-1, *[1] * (p.ndim - 1))
            own, grad = rate.view(shape), grad * clip.view(shape)
            mean = state.mean[name].lerp(grad, 1 - section.beta1)
            square = section.beta2 * state.square[name] + (1 - section.beta2) * grad * grad
            if name in self._decayed:
                p = p * (1 - own * section.weight_decay)
            p = p - own / first * mean / ((square / second).sqrt() + section.eps)
            for of, x in zip(found, (p, mean, square), strict=True):
                of[name] = x
        return found


def _compiled(advance, *example):
    """The step as one graph, forward, backward and optimizer, compiled."""
    graph = make_fx(lambda *args: advance(*args), tracing_mode="fake")(*example)  # it takes no bound method
    return torch.compile(graph)


def _factor(settings: Settings, step: int) -> float:
    """What the learning rate is multiplied by, the first step being 0: linear warmup, then a cosine."""
    section, steps = settings.lr_scheduler, settings.training.steps
    warmup = min(section.warmup_steps, steps)
    if step < warmup:
        return (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    return section.min_lr_factor + (1 - section.min_lr_factor) * cosine


def _most_answers(settings: Settings) -> int:
    """In a batch; a quarter of its tokens at least, so that a step on one task is compiled as on another."""
    condition = training_condition(settings)
    most = max(one.answers(condition.length) for one in condition.task.each_size())
    return max(most, condition.length // 4) * settings.training.local_batch_size


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for, as compilers are."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _joined(rows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    tokens, labels = zip(*rows, strict=True)
    return np.stack(tokens), np.stack(labels)


def _sequences(condition: Condition, settings: Settings, *, held_out: bool) -> TaskDataset:
    return TaskDataset(condition.task, condition.length, settings.task.seed or 0, held_out=held_out)


class _TrainingData:
    """Batches of a training, step by step; those of one step are made once for all that are trained on the same."""

    def __init__(self, settings: Settings) -> None:
        condition, self._size = training_condition(settings), settings.training.local_batch_size
        self._sequences = _sequences(condition, settings, held_out=False)
        self.key = repr(condition), settings.task.seed, self._size

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens and labels [B, T]."""
        return _joined([self._sequences.sequence(i) for i in range(step * self._size, (step + 1) * self._size)])


def _batch(rows: list[tuple[np.ndarray, np.ndarray]], answers: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [M, B, T], places of answers among the B * T tokens [M, A], and what is right there, IGNORE_INDEX for
    those places of the last axis that are left over."""
    tokens = torch.from_numpy(np.stack([tokens for tokens, _ in rows]).astype(np.int64))
    at = torch.zeros(len(rows), answers, dtype=torch.int64)
    wanted = torch.full_like(at, IGNORE_INDEX)
    for i, (_, labels) in enumerate(rows):
        places = np.flatnonzero(labels != IGNORE_INDEX)
        at[i, : len(places)] = torch.from_numpy(places)
        wanted[i, : len(places)] = torch.from_numpy(labels.reshape(-1)[places].astype(np.int64))
    return tokens, at, wanted
