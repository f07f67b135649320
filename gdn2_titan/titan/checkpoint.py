"""What this package changes in TorchTitan's checkpoints, under either generation.

Decays are exported exactly; parameters that had another name once are found; gdn2.json lies beside the weights, and the
rest of a Hugging Face folder beside an export in that format.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, HuggingFaceStorageReader, LoadPlan, LoadPlanner, Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.stateful import Stateful
from torch.futures import Future
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from gdn2_titan.convert.checkpoint_info import CheckpointInfo, write_info
from gdn2_titan.convert.hf_folder import write_model_files
from gdn2_titan.convert.mapping import from_hf_name, tensors_of, to_hf_name
from gdn2_titan.models import GDN2ModelArgs
from gdn2_titan.models.decay import DECAYS
from gdn2_titan.models.old_names import current_name

from .settings import Settings

__all__ = [
    "CurrentNamesHFReader", "CurrentNamesReader", "GDN2StateDictAdapter", "exact_decays",
    "keeps_decays_and_knows_old_names", "reading_old_names", "write_checkpoint_files",
]  # fmt: skip


def keeps_decays_and_knows_old_names(manager_cls: type) -> type:
    """Let a ``CheckpointManager`` class of either TorchTitan save A_log and dt_bias exactly, whatever
    ``checkpoint.export_dtype`` made of them, and load checkpoints with old names. Again is harmless."""
    stock = manager_cls.dcp_save
    if getattr(vars(manager_cls).get("dcp_save"), "keeps_decays", False):
        return manager_cls

    @functools.wraps(stock)
    def dcp_save(self, state_dict, *args, **kwargs):
        return stock(self, exact_decays(state_dict, self.states["model"]), *args, **kwargs)

    dcp_save.keeps_decays = True
    manager_cls.dcp_save = dcp_save
    manager_cls.dcp_load = reading_old_names(manager_cls.dcp_load)
    return manager_cls


def exact_decays(state_dict: dict, model: Stateful) -> dict:
    """A state dict that is about to be saved, with A_log and dt_bias as the model has them where they were rounded."""
    decays = tuple(f".decay.{decay}" for decay in DECAYS)
    found = {name: x for name, x in state_dict.items() if name.endswith(decays) and isinstance(x, torch.Tensor)}
    narrow = [name for name, x in found.items() if x.dtype.itemsize < 4]
    if not narrow:
        return state_dict
    held = model.state_dict()
    return state_dict | {name: held[name] for name in narrow}


class _CurrentNames:
    """Says today's names to who plans a load, and looks up the stored ones when it reads.

    stored: {today's name: stored name} of those that differ, from ``read_metadata`` on.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = super().read_metadata(*args, **kwargs)
        entries = metadata.state_dict_metadata
        names = {name: current_name(name) for name in entries}
        self.stored = {new: name for name, new in names.items() if new != name}
        return dataclasses.replace(metadata, state_dict_metadata={names[name]: entries[name] for name in entries})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        def as_stored(item: ReadItem) -> ReadItem:
            index = item.storage_index
            named = dataclasses.replace(index, fqn=self.stored.get(index.fqn, index.fqn))
            return dataclasses.replace(item, storage_index=named)

        return super().read_data(dataclasses.replace(plan, items=list(map(as_stored, plan.items))), planner)


class CurrentNamesReader(_CurrentNames, FileSystemReader):
    """Of folders that PyTorch's distributed checkpointing wrote."""


class CurrentNamesHFReader(_CurrentNames, HuggingFaceStorageReader):
    """Of folders of safetensors files."""


def _reader(state_dict: dict[str, Any], checkpoint_id: str) -> CurrentNamesReader | None:
    """A CurrentNamesReader if the checkpoint has names that are not today's and nobody wants them, else None."""
    old = any(current_name(name) != name for name in state_dict)
    if old or not FileSystemReader.validate_checkpoint_id(checkpoint_id):
        return None
    reader = CurrentNamesReader(checkpoint_id)
    try:
        reader.read_metadata()
    except FileNotFoundError:
        return None  # TorchTitan says that there is no checkpoint
    return reader if reader.stored else None


def reading_old_names(stock: Callable[..., None]) -> Callable[..., None]:
    """TorchTitan's ``CheckpointManager.dcp_load``, which also loads a checkpoint with old names, the optimizer's state
    included. Other checkpoints are loaded as they were."""

    @functools.wraps(stock)
    def dcp_load(self, state_dict, checkpoint_id, from_hf, from_quantized):
        reader = None if from_hf else _reader(state_dict, checkpoint_id)
        if reader is None:
            return stock(self, state_dict, checkpoint_id, from_hf, from_quantized)
        dcp.load(state_dict, storage_reader=reader)
        if "model" in self.states:
            self.states["model"].load_state_dict(state_dict)

    return dcp_load


def _saves(settings: Settings, step: int) -> bool:
    """Whether TorchTitan writes a checkpoint at the end of a step."""
    checkpoint = settings.checkpoint
    if not checkpoint.enable or checkpoint.load_only:
        return False
    first = step == 1 and checkpoint.enable_first_step_checkpoint
    return first or step == settings.training.steps or step % checkpoint.interval == 0


def write_checkpoint_files(settings: Settings, model_args: GDN2ModelArgs, step: int) -> None:
    """In a step that ends with a checkpoint, and on rank 0: gdn2.json in the checkpoints' folder; where the checkpoint
    will be a Hugging Face one, config.json, tokenizer and model card in its own.

    Not earlier: TorchTitan takes a folder of checkpoints for one to resume from, and forgets its initial_load_path.
    """
    if not _saves(settings, step) or (dist.is_initialized() and dist.get_rank()):
        return
    checkpoint = settings.checkpoint
    folder = Path(settings.job.dump_folder) / checkpoint.folder
    folder.mkdir(parents=True, exist_ok=True)
    info = CheckpointInfo(model_args, settings.to_dict())
    write_info(folder, info)
    if step == settings.training.steps and checkpoint.last_save_in_hf:
        own = folder / f"step-{step}"
        own.mkdir(exist_ok=True)
        write_model_files(own, info, os.path.abspath(settings.model.hf_assets_path), checkpoint.export_dtype, step)


_FILE_NUMBER = re.compile(r"model-(\d+)-of-\d+\.safetensors")


def _file_numbers(model_args: GDN2ModelArgs, folder: str | None) -> dict[str, int] | None:
    """{name: number of the file to save it in} after the index of a folder with this model's weights, else None: the
    tokenizer's folder may hold another model's, whose index would end a training at its last step."""
    path = os.path.join(folder or "", "model.safetensors.index.json")
    if folder is None or not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        files = json.load(file).get("weight_map", {})
    numbers = {current_name(name): _FILE_NUMBER.fullmatch(str(value)) for name, value in files.items()}
    if numbers.keys() != set(map(to_hf_name, tensors_of(model_args))) or None in numbers.values():
        return None
    return {name: int(found.group(1)) for name, found in numbers.items()}


class GDN2StateDictAdapter(BaseStateDictAdapter):
    """Tensor names of ``checkpoint.last_save_in_hf`` and ``initial_load_in_hf``.

    fqn_to_index_mapping is None, and everything goes into one file, unless model.hf_assets_path has this model's
    weights in several."""

    def __init__(self, model_args: GDN2ModelArgs, hf_assets_path: str | None) -> None:
        self.hf_assets_path = hf_assets_path
        self.fqn_to_index_mapping = _file_numbers(model_args, hf_assets_path)

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {to_hf_name(name): tensor for name, tensor in state_dict.items()}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return {from_hf_name(name): tensor for name, tensor in hf_state_dict.items()}

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> CurrentNamesHFReader:
        return CurrentNamesHFReader(path)
