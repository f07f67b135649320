"""TorchTitan 0.2.2: makes ``model.name = "gdn2"`` known. ``registered.toml`` names this module."""

from gdn2_titan.titan import register, settle_device

settle_device()  # the CPU where there is no accelerator; on GPUs leave it out
register()
