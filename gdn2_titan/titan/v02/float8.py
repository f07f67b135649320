"""The converters of 0.2.2's registry: ours for this model, TorchTitan's for all others in the process."""

import functools

from torchtitan.protocols import model_converter, train_spec

from gdn2_titan.models import GDN2Model

from ..float8 import NAMES, LinearConverter

__all__ = ["register_converters"]

STOCK = {name: model_converter._registry_model_converter_cls[name] for name in NAMES}


def _build(name, job_config, parallel_dims):
    if issubclass(train_spec.get_train_spec(job_config.model.name).model_cls, GDN2Model):
        return LinearConverter(job_config, parallel_dims, name)
    return STOCK[name](job_config, parallel_dims)


def register_converters():
    """Put ours in the places of TorchTitan's, for this model only. Again is harmless."""
    for name in NAMES:
        model_converter._registry_model_converter_cls[name] = functools.partial(_build, name)
