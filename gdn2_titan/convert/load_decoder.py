"""A checkpoint as the decoder that was trained, without transformers, whose imports take seconds."""

import torch

from gdn2_titan.models import GDN2Model
from gdn2_titan.models.decay import DECAYS

from .checkpoints import Checkpoint
from .empty_model import empty_model

__all__ = ["load_decoder"]


def load_decoder(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> GDN2Model:
    """GDN2Model, in eval mode, of a Checkpoint. Reads one tensor at a time.

    dtype: of the parameters, except the decay's; None for that of the checkpoint.

    Raises:
        ConvertError: the checkpoint is damaged.
    """
    source = checkpoint.source
    model = empty_model(checkpoint.info.model_args)
    dtype = dtype or source.tensors["lm_head.weight"].dtype
    model.load_state_dict(
        {
            name: source.read(name).to(device, torch.float32 if name.endswith(DECAYS) else dtype)
            for name in source.tensors
        },
        strict=False,  # statistics are in no file
        assign=True,
    )
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # Not zeros_like, which imports sympy to lay out what is like a tensor on the meta device: half a second.
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    return model.requires_grad_(False).eval()
