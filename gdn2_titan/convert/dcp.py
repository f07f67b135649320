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
from .torch_file import save_to

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
            self._check_files()
            for name in self.tensors:
                self._check_chunks(name)
        self._reader = FileSystemReader(self.path)
        self._reader.set_up_storage_reader(self._metadata, True)

    def _check_files(self):
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

    def _check_chunks(self, name):
        entry = self._metadata.state_dict_metadata[name]
        for chunk in entry.chunks:
            if MetadataIndex(name, chunk.offsets) not in self._metadata.storage_data:
                raise ConvertError(f"{self.path}/.metadata does not say where a part of tensor {name!r} is")
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
            offset = stream.tell()
            save_to(stream, tensor)
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
