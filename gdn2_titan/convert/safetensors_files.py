"""Folders of safetensors files, tensor by tensor."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from .errors import ConvertError, reading
from .run_folders import INDEX, SINGLE

__all__ = ["DTYPES", "SafetensorsFolder", "write_safetensors"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def _without_repeats(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ConvertError(f"it names {twice!r} twice")
    return found


def _files_by_tensor(folder):
    """{tensor: file name} of the index, or None where there is one file without an index."""
    path = folder / INDEX
    if not path.exists():
        return None
    with reading(path):
        try:
            index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        except ConvertError as error:
            raise ConvertError(f"{path} is damaged: {error}") from error
        files = dict(index["weight_map"])
        for name, file in files.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ConvertError(f"{path} says that tensor {name!r} is in {file!r}, which is no file of its folder")
    for file in sorted(set(files.values())):
        if not (folder / file).is_file():
            raise ConvertError(f"{folder / file} is not there; {INDEX} names it")
    return files


class SafetensorsFolder:
    """The tensors of ``model.safetensors``, or of the files that ``model.safetensors.index.json`` names; or of the one
    file that path is.

    tensors: {name: meta tensor with shape and dtype}, in the order of the files.

    Raises:
        ConvertError: a file is missing or damaged, or index and files differ.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_file():
            folder, indexed, files = self.path.parent, None, [self.path.name]
        else:
            folder, indexed = self.path, _files_by_tensor(self.path)
            if indexed is None and not (self.path / SINGLE).is_file():
                raise ConvertError(f"{self.path} has neither {SINGLE} nor {INDEX}")
            files = [SINGLE] if indexed is None else sorted(set(indexed.values()))
        self._folder = folder
        self.tensors, self._files, self._open = {}, {}, (None, None)
        for file in files:
            with reading(folder / file), safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():
                    if indexed is not None and indexed.get(name) != file:
                        where = f"in {indexed[name]}" if name in indexed else "nowhere"
                        raise ConvertError(f"tensor {name!r} is in {folder / file}; {INDEX} says it is {where}")
                    part = opened.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise ConvertError(
                            f"tensor {name!r} in {folder / file} has dtype {part.get_dtype()}; it must be one of "
                            f"{', '.join(DTYPES)}"
                        )
                    self.tensors[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
                    self._files[name] = file
        for name, file in (indexed or {}).items():
            if name not in self.tensors:
                raise ConvertError(f"{folder / file} does not have tensor {name!r}; {INDEX} says it is there")

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU. One file at a time is mapped into memory."""
        file = self._files[name]
        with reading(self._folder / file):
            if self._open[0] != file:
                self._open = file, safe_open(self._folder / file, framework="pt")
            return self._open[1].get_tensor(name)


def _shards(tensors, limit):
    """Lists of names, in order; each list's tensors take at most limit bytes, or it is one tensor."""
    shards, room = [[]], limit
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= tensor.nbytes
    return shards


def _header(tensors):
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise ConvertError(f"tensor {name!r} has dtype {tensor.dtype}; safetensors files take {[*_CODES]}")
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _CODES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], read: Callable[[str], torch.Tensor], shard_size: int
) -> None:
    """Writes files of ``shard_size`` bytes of tensors, and an index where there are several, into an existing folder.

    safetensors' own writer wants a file's tensors in memory together; this one holds one. tensors: {name: meta tensor},
    in the order to write. read: gives the tensor of a name, of that shape and dtype.

    Raises:
        OSError: a write failed.
    """
    shards, files = _shards(tensors, shard_size), {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with open(folder / file, "wb") as stream:
            stream.write(_header({name: tensors[name] for name in names}))
            for name in names:
                # As bytes: NumPy has no bfloat16.
                stream.write(read(name).contiguous().reshape(-1).view(torch.uint8).numpy())
                files[name] = file
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
