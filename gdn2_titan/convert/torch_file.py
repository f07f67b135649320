"""Files of torch.save, loaded as weights only."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import ConvertError, reading

__all__ = ["TorchFile", "save_to"]


class _KeepsError:
    """A stream that remembers why a write failed: torch.save reports only that one did."""

    def __init__(self, stream):
        self.stream, self.error = stream, None

    def write(self, data):
        try:
            return self.stream.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self):
        self.stream.flush()


def save_to(stream: BinaryIO, content: Any) -> None:
    """torch.save that raises the OSError of a failed write."""
    keeper = _KeepsError(stream)
    try:
        torch.save(content, keeper)
    except RuntimeError:
        if keeper.error is not None:
            raise keeper.error from None
        raise


class TorchFile:
    """The tensors of a file: the dict itself, or the one under "model" or "state_dict" in it.

    tensors: {name: meta tensor with shape and dtype}.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with reading(path):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if isinstance(content, dict):
            inner = [content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)]
            content = inner[0] if inner else content
        if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
            raise ConvertError(f'{path} must hold a dict of tensors, alone or under "model" or "state_dict"')
        self._content = content
        self.tensors = {name: tensor.to("meta") for name, tensor in content.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._content[name].clone()
