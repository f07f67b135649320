"""Reads what a distributed checkpoint says of itself. The file is a pickle; only data can come out of it here."""

import pickle
from pathlib import Path

from .errors import ConvertError, reading

__all__ = ["read_metadata"]

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
    def find_class(self, module, name):
        if name not in _CLASSES.get(module, ()):
            raise ConvertError(
                f"the checkpoint's .metadata names {module}.{name}, which is none of the plain classes that PyTorch "
                "writes there; it was not loaded"
            )
        return super().find_class(module, name)


def read_metadata(folder):
    """torch.distributed.checkpoint.metadata.Metadata of a checkpoint folder.

    Raises:
        ConvertError: it is missing, damaged, or names anything but data.
    """
    path = Path(folder) / ".metadata"
    with reading(path), open(path, "rb") as file:
        metadata = _DataUnpickler(file).load()
        if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(metadata.storage_data, dict):
            raise ConvertError(f"{path} is not the metadata of a distributed checkpoint with one writer per file")
        return metadata
