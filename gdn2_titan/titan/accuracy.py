"""Counts right answers while a loss is computed."""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torchtitan.components.loss import IGNORE_INDEX

__all__ = ["Accuracy"]


class Accuracy:
    """Watches a loss: how many answers (labels that are not IGNORE_INDEX) and how many of them wrong, per sequence.

    An answer is right if its logit is the greatest. cp_mesh, dp_mesh: the ranks that share sequences, and those that
    have other sequences, or None. apart: (symbol, its name, name of the others), to count those answers separately too.
    """

    def __init__(self, cp_mesh, dp_mesh, apart=None):
        self._cp_mesh, self._dp_mesh = cp_mesh, dp_mesh
        self._apart = apart
        self._counts = []

    @torch.no_grad()
    def __call__(self, logits, labels):
        """logits: [B, T, vocabulary], also as a DTensor sharded over the vocabulary; labels: int64 [B, T]."""
        answered = labels != IGNORE_INDEX
        wrong = torch.zeros_like(answered)
        wrong[answered] = _greatest(logits, answered) != labels[answered]
        apart = torch.zeros_like(answered) if self._apart is None else labels == self._apart[0]
        counted = answered, wrong, apart, apart & wrong
        self._counts.append(torch.stack([these.sum(1) for these in counted]))

    def shares(self):
        """{"accuracy": share of right answers, "exact": share of sequences all of whose answers are right}, and the
        accuracy of each kind of answer that is counted apart; None on a rank that had no logits. Every rank that had
        some must ask."""
        if not self._counts:
            return None
        counts = torch.cat(self._counts, 1)
        if self._cp_mesh is not None:  # a sequence is right if every rank's part of it is
            dist.all_reduce(counts, group=self._cp_mesh.get_group())
        right = counts[1] == 0
        sums = torch.cat((counts.sum(1), right.new_tensor([right.numel(), right.sum()], dtype=torch.int64)))
        if self._dp_mesh is not None:
            dist.all_reduce(sums, group=self._dp_mesh.get_group())
        answers, wrong, apart, wrong_apart, sequences, exact = sums.tolist()
        shares = {"accuracy": (answers - wrong) / answers, "exact": exact / sequences}
        if self._apart is not None:
            _, name, others = self._apart
            shares[name] = (apart - wrong_apart) / apart
            shares[others] = (answers - apart - wrong + wrong_apart) / (answers - apart)
        return shares


def _greatest(logits, answered):
    """The symbol with the greatest logit at each answer."""
    if not isinstance(logits, DTensor):
        return logits[answered].argmax(-1)
    # The few answers are gathered, not all of the logits.
    placements, mesh = logits.placements, logits.device_mesh
    local = logits.to_local()[answered]
    shape = torch.Size((local.shape[0], logits.shape[-1]))
    vocabulary = [Shard(1) if p.is_shard(2) or p.is_shard(-1) else p for p in placements]
    answers = DTensor.from_local(local, mesh, vocabulary, run_check=False, shape=shape, stride=(shape[1], 1))
    return answers.full_tensor().argmax(-1)
