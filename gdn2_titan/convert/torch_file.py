"""Files of torch.save, of which tensors and plain values are loaded."""

import codecs
import collections
import os
import pickle
import types
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import ConvertError, reading

__all__ = ["TorchFile", "save_to"]

# Bytes of a file that are read before it is mapped anew.
MAPPED = 2**28


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


class _Unread:
    """Stands where a file has an object of another type than _data_of builds, whatever was to be done with it."""

    def __new__(cls, *args: Any, **options: Any) -> "_Unread":
        return super().__new__(cls)

    def __call__(self, *args: Any) -> "_Unread":
        return self

    def _leave(self, *args: Any) -> None:
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = add = _leave


_TENSORS = ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter", "_rebuild_parameter_with_state")
_PLAIN = {
    ("collections", "OrderedDict"): collections.OrderedDict, ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device, ("_codecs", "encode"): codecs.encode,
    **{(module, one.__name__): one for module in ("builtins", "__builtin__") for one in (set, frozenset, complex)},
}  # fmt: skip


def _data_of(module, name):
    """What a pickle may name: what builds tensors and plain values. None for all else."""
    if module == "torch._utils" and name in _TENSORS:
        build = getattr(torch._utils, name)
        return lambda *args: build(*args)  # a new function, as a file may set attributes of what it names
    if (module, name) in _PLAIN:
        return _PLAIN[module, name]
    found = getattr(torch, name, None) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def _load(path):
    """(content, names of the types that are not built). Tensors are mapped, not read; no code of the file runs.

    torch.load's own weights_only refuses a file for any other type in it.
    """
    unread = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found = _data_of(module, name)
            if found is None:
                unread.add(f"{module}.{name}")
                return type(name, (_Unread,), {})
            return found

    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ConvertError(f"{path} is a TorchScript archive; it must be a file of torch.save")
    reader = types.SimpleNamespace(__name__="pickle", Unpickler=Unpickler)
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=reader)
    return content, sorted(unread)


class TorchFile:
    """The tensors of a file: the dict itself, or the one under "model" or "state_dict" in it.

    tensors: {name: meta tensor with shape and dtype}. others: what stands beside that dict, {} where nothing does.
    unread: names of the types whose objects, anywhere in the file, were not built, as that might run code.

    Raises:
        ConvertError: the file is missing, damaged, of another kind, or has no such dict.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        content, self.others = self._open()
        if not isinstance(content, dict) or not content:
            raise ConvertError(f'{path} must hold a dict of tensors, alone or under "model" or "state_dict"')
        for name, tensor in content.items():
            if not isinstance(name, str):
                raise ConvertError(f"{path} has a tensor of name {name!r}; names must be strings")
            if not isinstance(tensor, torch.Tensor):
                raise ConvertError(f"{path} has {name!r} of type {type(tensor).__name__}; it must be a tensor")
        self._content, self._mapped = content, 0
        self.tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in content.items()}

    def _open(self):
        """(the dict of tensors, or what is in its place; what stands beside it)."""
        with reading(self.path):
            content, self.unread = _load(self.path)
        inner = [
            key for key in ("model", "state_dict") if isinstance(content, dict) and isinstance(content.get(key), dict)
        ]
        if not inner:
            return content, {}
        return content[inner[0]], {key: value for key, value in content.items() if key != inner[0]}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, mapped from the file."""
        if self._mapped > MAPPED:  # what has been read stays in memory as long as its file is mapped
            self._content, self._mapped = self._open()[0], 0
        tensor = self._content[name].detach()
        self._mapped += tensor.nbytes
        return tensor
