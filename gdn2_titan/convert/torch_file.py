"""One file of torch.save with a dict of tensors, loaded as weights only."""

from pathlib import Path

import torch

from .errors import ConvertError, reading

__all__ = ["TorchFile"]


class TorchFile:
    """The tensors of a file: the dict itself, or the one under "model" or "state_dict" in it.

    tensors: {name: meta tensor with shape and dtype}.
    """

    def __init__(self, path):
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

    def read(self, name):
        return self._content[name].clone()
