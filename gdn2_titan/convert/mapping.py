"""A checkpoint's tensors under other names, shapes and dtypes, and whether they fit a model."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from gdn2_titan.models import GDN2ModelArgs
from gdn2_titan.models.old_names import current_name

from .empty_model import empty_model
from .errors import ConvertError

__all__ = ["CurrentNames", "Part", "Renamed", "Source", "check_fits", "from_hf_name", "replace_prefix", "tensors_of",
           "to_hf_name"]  # fmt: skip

_TO_HF = {"tok_embeddings.": "model.embed_tokens.", "lm_head.": "lm_head.", "": "model."}
_FROM_HF = {theirs: ours for ours, theirs in _TO_HF.items()}


def replace_prefix(name: str, prefixes: Mapping[str, str]) -> str | None:
    """``name`` with the first of the prefixes {old: new} that it begins with replaced; None where it has none."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def to_hf_name(name: str) -> str:
    """The name in a Hugging Face folder of the decoder's tensor ``name``."""
    return replace_prefix(name, _TO_HF)


def from_hf_name(name: str) -> str:
    """The decoder's name of a Hugging Face folder's tensor ``name``; the inverse of :func:`to_hf_name`.

    Raises:
        ValueError: the name is not one that :func:`to_hf_name` gives.
    """
    found = replace_prefix(name, _FROM_HF)
    if found is None:
        raise ValueError(f"tensor name is {name!r}; it must begin with 'model.' or 'lm_head.'")
    return found


class Source(Protocol):
    """A checkpoint, read tensor by tensor."""

    path: Path
    tensors: Mapping[str, torch.Tensor]  # on the meta device, with shape and dtype

    def read(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Part:
    """Where a tensor comes from: another one's name, and what to do with that (pick rows, reshape)."""

    name: str
    of: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


class CurrentNames:
    """A checkpoint of this model whose tensors have today's names, whichever it was written with."""

    def __init__(self, source: Source) -> None:
        self.path, self._source = source.path, source
        self._stored = {}
        for name in source.tensors:
            current = current_name(name)
            self._stored[name if current in source.tensors else current] = name
        self.tensors = {name: source.tensors[stored] for name, stored in self._stored.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(self._stored[name])


def _check_names(source: Source, wanted: Set[str]) -> None:
    for name in sorted(wanted - source.tensors.keys()):
        raise ConvertError(f"{source.path} has no tensor {name!r}, which the model's configuration calls for")
    for name in sorted(source.tensors.keys() - wanted):
        raise ConvertError(f"{source.path} has tensor {name!r}, which the model's configuration has no place for")


class Renamed:
    """The tensors that ``mapping`` {name: Part} makes of a checkpoint's, in ``dtype`` if given.

    A_log and dt_bias keep their dtype: the model computes decays in fp32, and rounding these to bf16 would move
    half-lives by up to two percent.

    Raises:
        ConvertError: the checkpoint lacks a tensor that the mapping wants, has one that it does not name, or one of a
            shape that it cannot use.
    """

    def __init__(self, source: Source, mapping: Mapping[str, Part], dtype: torch.dtype | None = None) -> None:
        self.path, self._source, self._mapping, self._dtype = source.path, source, mapping, dtype
        _check_names(source, {part.name for part in mapping.values()})
        self.tensors = {name: self._make(name, source.tensors[part.name]) for name, part in mapping.items()}

    def _make(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        try:
            tensor = self._mapping[name].of(tensor)
        except RuntimeError as error:
            raise ConvertError(
                f"{self.path} has tensor {self._mapping[name].name!r} of shape {[*tensor.shape]}, from which {name!r} "
                "cannot be made"
            ) from error
        kept = self._dtype is None or name.endswith((".A_log", ".dt_bias"))
        return tensor if kept else tensor.to(self._dtype)

    def read(self, name: str) -> torch.Tensor:
        return self._make(name, self._source.read(self._mapping[name].name))


def tensors_of(args: GDN2ModelArgs) -> dict[str, torch.Tensor]:
    """{name: meta tensor} of the model's checkpoint.

    Raises:
        ConvertError: no model can be built from args.
    """
    try:
        return empty_model(args).state_dict()
    except (ValueError, TypeError) as error:
        raise ConvertError(f"no model can be built from the configuration: {error}") from error


def check_fits(source: Source, args: GDN2ModelArgs) -> None:
    """Raise ConvertError unless a checkpoint has exactly the model's tensors, by their names here, in its shapes."""
    expected = tensors_of(args)
    _check_names(source, expected.keys())
    for name, tensor in source.tensors.items():
        if tensor.shape != expected[name].shape:
            raise ConvertError(
                f"{source.path} has tensor {name!r} of shape {[*tensor.shape]}; the model's configuration makes it "
                f"{[*expected[name].shape]}"
            )
