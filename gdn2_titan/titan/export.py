"""Decays in the checkpoints that TorchTitan exports in another dtype (``checkpoint.export_dtype``)."""

import torch
from torch.distributed.checkpoint.stateful import Stateful

from gdn2_titan.models.decay import DECAYS

__all__ = ["exact_decays"]


def exact_decays(state_dict: dict, model: Stateful) -> dict:
    """A state dict that is about to be saved, with A_log and dt_bias as the model has them where they were rounded."""
    narrow = [
        name
        for name, value in state_dict.items()
        if name.endswith(tuple(f".decay.{decay}" for decay in DECAYS))
        and isinstance(value, torch.Tensor)
        and value.dtype.itemsize < 4
    ]
    if not narrow:
        return state_dict
    held = model.state_dict()
    return state_dict | {name: held[name] for name in narrow}
