"""The plug into TorchTitan. Two lines register the model in a fork of the TOML generation (0.2.2):

from gdn2_titan.titan import register
register()

In the generation of config functions (0.3.x) they are in ``config_registry``: ``--module gdn2_titan.titan --config
gdn2_debug_hybrid``.
"""

from . import quiet  # noqa: F401, for what importing it does
from .cpu import settle_device
from .torchtitan_version import IS_V02

__all__ = ["settle_device"]

if IS_V02:
    from .v02.train_spec import get_train_spec, register

    __all__ += ["get_train_spec", "register"]
