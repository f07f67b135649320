"""The plug into TorchTitan (0.2.2, the TOML generation). Two lines register the model in a TorchTitan fork:

from gdn2_titan.titan import register
register()
"""

from .cpu import settle_device
from .train_spec import get_train_spec, register

__all__ = ["get_train_spec", "register", "settle_device"]
