"""The model that a config describes."""

from typing import Any

from gdn2_titan.models import GDN2ModelArgs
from gdn2_titan.models.overrides import model_args_of

from .sections import section

__all__ = ["model_args"]


def model_args(job_config: Any) -> GDN2ModelArgs:
    """GDN2ModelArgs of model.flavor with the changes of [gdn2]. Unchecked."""
    return model_args_of(job_config.model.flavor, section(job_config, "gdn2"))
