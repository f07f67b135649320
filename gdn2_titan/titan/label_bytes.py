"""How many bytes of text a loss is about: what turns nats per token into bits per byte.

Told by tokenizers whose symbols are pieces of UTF-8: the byte-level ones (this package's, GPT-2's, Llama 3's) and those
with byte fallback (Llama 2's; the space that these put before a document counts as a byte of it).
"""

import json
import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.loss import IGNORE_INDEX

__all__ = ["LabelBytes", "bytes_of_symbols", "count", "counters"]

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def bytes_of_symbols(folder: str | Path) -> torch.Tensor | None:
    """int64 [symbols]: bytes of text that each symbol of a tokenizer stands for, 0 for special ones; None unless
    tokenizer.json tells."""
    path = Path(folder, "tokenizer.json")
    found = json.loads(path.read_bytes()) if path.is_file() else {}
    model, added = found.get("model") or {}, found.get("added_tokens") or []
    normalizer, vocabulary = json.dumps(found.get("normalizer")), model.get("vocab")
    if isinstance(vocabulary, list):  # of (symbol, score)
        vocabulary = {pair[0]: index for index, pair in enumerate(vocabulary)}
    if not vocabulary:
        return None
    kinds = set(re.findall(r'"type": "(\w+)"', normalizer))
    if '"ByteLevel"' in json.dumps([found.get("pre_tokenizer"), found.get("decoder")]):
        if kinds - {"NFC", "Sequence"}:
            return None  # what it makes of a text has not the text's bytes
        lengths = {index: len(symbol) for symbol, index in vocabulary.items()}
    elif model.get("byte_fallback"):
        if kinds - {"Prepend", "Replace", "Sequence", "String"}:
            return None
        lengths = {
            index: 1 if _BYTE.fullmatch(symbol) else len(symbol.replace("\u2581", " ").encode())
            for symbol, index in vocabulary.items()
        }
    else:
        return None
    lengths |= {token["id"]: 0 if token["special"] else len(token["content"].encode()) for token in added}
    table = torch.zeros(max(lengths) + 1, dtype=torch.long)
    table[list(lengths)] = torch.tensor(list(lengths.values()))
    return table


class LabelBytes:
    """Adds up labels, and their bytes, of the losses that it is shown.

    table: of ``bytes_of_symbols``.
    """

    def __init__(self, table: torch.Tensor) -> None:
        self._table, self._sums = table, None

    def add(self, labels: torch.Tensor) -> None:
        """labels: int64, of any shape. Waits for no GPU."""
        self._table = self._table.to(labels.device)
        learnt = labels != IGNORE_INDEX
        known = learnt & (labels < len(self._table))
        sums = torch.stack((learnt.sum(), self._table[labels.where(known, 0)].where(known, 0).sum()))
        self._sums = sums if self._sums is None else self._sums + sums

    def forget(self) -> None:
        self._sums = None

    def take(self, mesh: DeviceMesh | None) -> float | None:
        """Labels per byte since the last call, over the ranks of the mesh that share the loss, all of which must ask;
        None without a byte."""
        sums, self._sums = self._sums, None
        if sums is None:
            return None
        if mesh is not None:
            dist.all_reduce(sums, group=mesh.get_group())
        labels, length = sums.tolist()
        return labels / length if length else None


# Of this process's training and validation, while there is one: TorchTitan shows the loss to nobody who logs it.
counters: dict[str, LabelBytes] = {}


def count(labels: torch.Tensor) -> None:
    """Called by every loss with its labels: those of training if there will be gradients."""
    if counters:
        counters["training" if torch.is_grad_enabled() else "validation"].add(labels)
