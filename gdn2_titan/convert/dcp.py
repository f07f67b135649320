"""Distributed checkpoints (PyTorch's DCP, which TorchTitan writes), tensor by tensor and without a process group."""

import math
import os
import pickle
from pathlib import Path

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

from .dcp_metadata import read_metadata
from .errors import ConvertError, reading

__all__ = ["DistributedCheckpoint", "write_dcp"]

# What TorchTitan saves beside the model, whose own tensors have no prefix.
_NOT_THE_MODEL = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")


class DistributedCheckpoint:
    """The model's tensors in a checkpoint folder, however they were sharded.

    tensors: {name: meta tensor with shape and dtype}.
    """

    def __init__(self, folder):
        self.path = Path(folder)
        self._metadata = read_metadata(folder)
        with reading(self.path / ".metadata"):
            self.tensors = {
                name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                for name, entry in self._metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata) and not name.startswith(_NOT_THE_MODEL)
            }
            for name in self.tensors:
                self._check_chunks(name)
        self._reader = FileSystemReader(self.path)
        self._reader.set_up_storage_reader(self._metadata, True)

    def _check_chunks(self, name):
        entry = self._metadata.state_dict_metadata[name]
        for chunk in entry.chunks:
            info = self._metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
            if info is None:
                raise ConvertError(f"{self.path}/.metadata does not say where a part of tensor {name!r} is")
            if Path(info.relative_path).name != info.relative_path:
                raise ConvertError(f"{self.path}/.metadata names {info.relative_path!r}, outside of the checkpoint")
            file = self.path / info.relative_path
            if not file.is_file():
                raise ConvertError(f"{file} is not there; tensor {name!r} is in it")
            if file.stat().st_size < info.offset + info.length:
                raise ConvertError(
                    f"{file} is truncated: tensor {name!r} ends at byte {info.offset + info.length}, the file at "
                    f"{file.stat().st_size}"
                )
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise ConvertError(f"{self.path} holds {name!r} in parts that do not add up to its shape {[*entry.size]}")

    def read(self, name):
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


def write_dcp(folder, names, tensors):
    """Writes a checkpoint of one file into an existing folder.

    PyTorch's own writer keeps every tensor until its file is closed; this one holds none.

    Args:
        names: of the tensors, in order.
        tensors: an iterable of them, read once.

    Raises:
        OSError: a write failed.
    """
    entries, storage, file = {}, {}, "__0_0.distcp"
    with open(Path(folder) / file, "wb") as stream:
        for name, tensor in zip(names, tensors, strict=True):
            keeper, offset = _KeepsError(stream), stream.tell()
            try:
                torch.save(tensor, keeper)
            except RuntimeError:
                if keeper.error is not None:
                    raise keeper.error from None
                raise
            start = torch.Size([0] * tensor.dim())
            entries[name] = TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype), tensor.shape, [ChunkStorageMetadata(start, tensor.shape)]
            )
            storage[MetadataIndex(name, start)] = _StorageInfo(file, offset, stream.tell() - offset)
        os.fsync(stream.fileno())
    metadata = Metadata(
        entries,
        planner_data={name: (name,) for name in entries},
        storage_data=storage,
        storage_meta=StorageMeta(),
    )
    with open(Path(folder) / ".metadata", "wb") as stream:
        pickle.dump(metadata, stream)
