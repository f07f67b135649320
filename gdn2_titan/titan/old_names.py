"""Checkpoints that name parameters as this package once did, read under today's names."""

import dataclasses
import functools

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, HuggingFaceStorageReader

from gdn2_titan.models.old_names import current_name

__all__ = ["CurrentNamesHFReader", "CurrentNamesReader", "reading_old_names"]


class _CurrentNames:
    """Says today's names to who plans a load, and looks up the stored ones when it reads.

    stored: {today's name: stored name} of those that differ, from ``read_metadata`` on.
    """

    def read_metadata(self, *args, **kwargs):
        metadata = super().read_metadata(*args, **kwargs)
        entries = metadata.state_dict_metadata
        names = {name: current_name(name) for name in entries}
        self.stored = {new: name for name, new in names.items() if new != name}
        return dataclasses.replace(metadata, state_dict_metadata={names[name]: entries[name] for name in entries})

    def read_data(self, plan, planner):
        items = []
        for item in plan.items:
            name = self.stored.get(item.storage_index.fqn)
            if name is not None:
                item = dataclasses.replace(item, storage_index=dataclasses.replace(item.storage_index, fqn=name))
            items.append(item)
        return super().read_data(dataclasses.replace(plan, items=items), planner)


class CurrentNamesReader(_CurrentNames, FileSystemReader):
    """Of folders that PyTorch's distributed checkpointing wrote."""


class CurrentNamesHFReader(_CurrentNames, HuggingFaceStorageReader):
    """Of folders of safetensors files."""


def _reader(state_dict, checkpoint_id):
    """A CurrentNamesReader if the checkpoint has names that are not today's and nobody wants them, else None."""
    if any(current_name(name) != name for name in state_dict) or not FileSystemReader.validate_checkpoint_id(
        checkpoint_id
    ):
        return None
    reader = CurrentNamesReader(checkpoint_id)
    try:
        reader.read_metadata()
    except FileNotFoundError:
        return None  # TorchTitan says that there is no checkpoint
    return reader if reader.stored else None


def reading_old_names(stock):
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
