"""Distributed checkpoints (PyTorch's DCP, which TorchTitan writes), tensor by tensor and without a process group."""

import math
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .errors import ConvertError, reading
from .torch_file import save_to

__all__ = ["DistributedCheckpoint", "write_dcp"]

# What TorchTitan saves beside the model, whose own tensors have no prefix.
_NOT_THE_MODEL = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")

# What PyTorch's own writer puts into the file; dtypes are names of torch that are dtypes.
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
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
        if name not in _CLASSES.get(module, ()):
            raise ConvertError(
                f"the checkpoint's .metadata names {module}.{name}, which is none of the plain classes that PyTorch "
                "writes there; it was not loaded"
            )
        return super().find_class(module, name)


def _read_metadata(folder: Path) -> Metadata:
    """What a checkpoint says of itself. The file is a pickle; only data can come out of it here."""
    path = folder / ".metadata"
    with reading(path), open(path, "rb") as file:
        metadata = _DataUnpickler(file).load()
        if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(metadata.storage_data, dict):
            raise ConvertError(f"{path} is not the metadata of a distributed checkpoint with one writer per file")
        return metadata


class DistributedCheckpoint:
    """The model's tensors in a checkpoint folder, however they were sharded.

    tensors: {name: meta tensor with shape and dtype}.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        self._metadata = _read_metadata(self.path)
        with reading(self.path / ".metadata"):
            self.tensors = {
                name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                for name, entry in self._metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata) and not name.startswith(_NOT_THE_MODEL)
            }
            self._check_files()
            for name in self.tensors:
                self._check_chunks(name)
        self._reader = FileSystemReader(self.path)
        self._reader.set_up_storage_reader(self._metadata, True)

    def _check_files(self) -> None:
        """Those of other states too: where they are damaged the checkpoint is, whatever the model's part looks like."""
        sizes = {}
        for index, info in self._metadata.storage_data.items():
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
        entry = self._metadata.state_dict_metadata[name]
        for chunk in entry.chunks:
            if MetadataIndex(name, chunk.offsets) not in self._metadata.storage_data:
                raise ConvertError(f"{self.path}/.metadata does not say where a part of tensor {name!r} is")
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise ConvertError(f"{self.path} holds {name!r} in parts that do not add up to its shape {[*entry.size]}")

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, on the CPU. Takes memory for it and for its largest stored part."""
        tensor = torch.empty_like(self.tensors[name], device="cpu")
        files = {
            self._metadata.storage_data[MetadataIndex(name, chunk.offsets)].relative_path
            for chunk in self._metadata.state_dict_metadata[name].chunks
        }
        with reading(" and ".join(str(self.path / file) for file in sorted(files))):
            planner = DefaultLoadPlanner()
            planner.set_up_planner({name: tensor}, self._metadata, True)
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        return tensor


def write_dcp(folder: str | os.PathLike[str], names: Iterable[str], read: Callable[[str], torch.Tensor]) -> None:
    """Writes a checkpoint of one file, of the tensors that ``read`` gives for ``names``, into an existing folder.

    PyTorch's own writer keeps every tensor until its file is closed; this one holds none.

    Raises:
        OSError: a write failed.
    """
    entries, storage, file = {}, {}, "__0_0.distcp"
    with open(Path(folder) / file, "wb") as stream:
        for name in names:
            tensor, offset = read(name), stream.tell()
            save_to(stream, tensor)
            start = torch.Size([0] * tensor.dim())
            entries[name] = TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype), tensor.shape, [ChunkStorageMetadata(start, tensor.shape)]
            )
            storage[MetadataIndex(name, start)] = _StorageInfo(file, offset, stream.tell() - offset)
        os.fsync(stream.fileno())
    metadata = Metadata(entries, {name: (name,) for name in entries}, storage, StorageMeta())
    with open(Path(folder) / ".metadata", "wb") as stream:
        pickle.dump(metadata, stream)
