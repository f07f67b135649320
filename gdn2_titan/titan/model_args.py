"""The model that a config describes."""

import dataclasses

from gdn2_titan.models import flavors

from .sections import section

__all__ = ["model_args"]


def model_args(job_config):
    """GDN2ModelArgs of model.flavor with the changes of [gdn2]. Unchecked."""
    return dataclasses.replace(flavors[job_config.model.flavor], **section(job_config, "gdn2").overrides())
