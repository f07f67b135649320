"""Distributed checkpoints (PyTorch's DCP, which TorchTitan writes), tensor by tensor and without a process group.

Read without PyTorch's own reader, whose import brings DTensor and takes longer than all else that a command does.
"""

import io
import math
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import ConvertError, reading

__all__ = ["DistributedCheckpoint"]

# What TorchTitan saves beside the model, whose own tensors have no prefix.
_NOT_THE_MODEL = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")


class _Record:
    """The fields of an object of one of PyTorch's dataclasses, as the file says them."""

    def __init__(self, *args: Any) -> None:
        pass


class _Tensor(_Record):
    """TensorStorageMetadata: properties, size, chunks (records with offsets and sizes)."""


class _Properties(_Record):
    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


class _Index(_Record):
    """MetadataIndex, the key of a chunk: the tensor's name, and where in it the chunk begins."""

    fqn = offset = None

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Index) and (self.fqn, self.offset) == (other.fqn, other.offset)

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))


# What PyTorch's own writer puts into the file; dtypes are names of torch that are dtypes.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "TensorStorageMetadata": _Tensor, "TensorProperties": _Properties, "MetadataIndex": _Index,
        **dict.fromkeys(
            ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "StorageMeta", "_MEM_FORMAT_ENCODING"), _Record
        ),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo": _Record},
}  # fmt: skip
_CLASSES = {
    "torch": {
        "Size", "bfloat16", "bool", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int8", "int16",
        "int32", "int64", "uint8",
    },
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if record := _RECORDS.get(module, {}).get(name):
            return record
        if name not in _CLASSES.get(module, ()):
            raise ConvertError(
                f"the checkpoint's .metadata names {module}.{name}, which is none of the plain classes that PyTorch "
                "writes there; it was not loaded"
            )
        return super().find_class(module, name)


def _read_metadata(folder: Path) -> tuple[dict[str, _Record], dict[_Index, _Record]]:
    """What a checkpoint says of its entries and of where each part of them is. The file is a pickle; only data can come
    out of it here."""
    path = folder / ".metadata"
    with reading(path), open(path, "rb") as file:
        metadata = _DataUnpickler(file).load()
        entries, storage = metadata.state_dict_metadata, metadata.storage_data
        if not isinstance(entries, dict) or not isinstance(storage, dict):
            raise ConvertError(f"{path} is not the metadata of a distributed checkpoint with one writer per file")
        return entries, storage


class _Slice(io.RawIOBase):
    """Bytes ``start`` to ``start + length`` of a file as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        got = self._file.readinto(memoryview(buffer)[: max(self._length - self._at, 0)])
        self._at += got
        return got


class DistributedCheckpoint:
    """The model's tensors in a checkpoint folder, however they were sharded.

    tensors: {name: meta tensor with shape and dtype}.

    Raises:
        ConvertError: the folder is damaged, here or while it is read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        entries, self._storage = _read_metadata(self.path)
        with reading(self.path / ".metadata"):
            self._entries = {
                name: entry
                for name, entry in entries.items()
                if isinstance(entry, _Tensor) and not name.startswith(_NOT_THE_MODEL)
            }
            self.tensors = {
                name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                for name, entry in self._entries.items()
            }
            self._check_files()
            for name in self.tensors:
                self._check_chunks(name)

    def _check_files(self) -> None:
        """Those of other states too: where they are damaged the checkpoint is, whatever the model's part looks like."""
        sizes = {}
        for index, info in self._storage.items():
            file = self.path / info.relative_path
            if file.name != info.relative_path:
                raise ConvertError(f"{self.path}/.metadata names {info.relative_path!r}, outside of the checkpoint")
            if file not in sizes:
                if not file.is_file():
                    raise ConvertError(f"{file} is not there; {index.fqn!r} is in it")
                sizes[file] = file.stat().st_size
            if sizes[file] < info.offset + info.length:
                raise ConvertError(
                    f"{file} is truncated: {index.fqn!r} ends at byte {info.offset + info.length}, the file at "
                    f"{sizes[file]}"
                )

    def _check_chunks(self, name: str) -> None:
        entry = self._entries[name]
        for chunk in entry.chunks:
            info = self._part(name, chunk)
            if info is None:
                raise ConvertError(f"{self.path}/.metadata does not say where a part of tensor {name!r} is")
            if getattr(info, "transform_descriptors", None):
                raise ConvertError(f"{self.path} holds tensor {name!r} packed by {info.transform_descriptors}; it must "
                                   "be saved without extensions of the writer")  # fmt: skip
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise ConvertError(f"{self.path} holds {name!r} in parts that do not add up to its shape {[*entry.size]}")

    def _part(self, name: str, chunk: _Record) -> _Record | None:
        """Where in which file a part of a tensor is."""
        index = _Index()
        index.fqn, index.offset = name, chunk.offsets
        return self._storage.get(index)

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, on the CPU. Takes memory for it and for its largest stored part."""
        entry, tensor = self._entries[name], self.tensors[name]
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype)  # not empty_like: see load_decoder
        for chunk in entry.chunks:
            info = self._part(name, chunk)
            path = self.path / info.relative_path
            with reading(path), open(path, "rb") as file:
                part = torch.load(_Slice(file, info.offset, info.length), map_location="cpu", weights_only=True)
                if part.shape != chunk.sizes:
                    raise ValueError(f"a part of tensor {name!r} has shape {[*part.shape]}, not {[*chunk.sizes]}")
                within = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
                tensor[within].copy_(part)
        return tensor
