"""Tensor names of TorchTitan's ``checkpoint.last_save_in_hf`` and ``initial_load_in_hf``."""

import json
import os
import re

from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from gdn2_titan.convert.mapping import from_hf_name, tensors_of, to_hf_name
from gdn2_titan.models.old_names import current_name

from .old_names import CurrentNamesHFReader

__all__ = ["GDN2StateDictAdapter"]

_FILE_NUMBER = re.compile(r"model-(\d+)-of-\d+\.safetensors")


def _file_numbers(model_args, folder):
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
    """fqn_to_index_mapping is None, and everything goes into one file, unless model.hf_assets_path has this model's
    weights in several."""

    def __init__(self, model_args, hf_assets_path):
        self.hf_assets_path = hf_assets_path
        self.fqn_to_index_mapping = _file_numbers(model_args, hf_assets_path)

    def to_hf(self, state_dict):
        return {to_hf_name(name): tensor for name, tensor in state_dict.items()}

    def from_hf(self, hf_state_dict):
        return {from_hf_name(name): tensor for name, tensor in hf_state_dict.items()}

    def get_hf_storage_reader(self, path, from_quantized=False):
        return CurrentNamesHFReader(path)
