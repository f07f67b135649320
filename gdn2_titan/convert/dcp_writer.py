"""Writes distributed checkpoints (PyTorch's DCP), as TorchTitan loads them: see ``dcp``, which reads them."""

import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .torch_file import save_to

__all__ = ["write_dcp"]


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
