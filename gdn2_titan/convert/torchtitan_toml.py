"""The model of a TorchTitan TOML file."""

from .errors import ConvertError
from .record import Record

__all__ = ["record_of_toml"]


def record_of_toml(path):
    """Record of the model that TorchTitan would build from the file.

    Raises:
        ConvertError: TorchTitan is not installed, or the file is not one of its configs for this model.
    """
    try:
        from gdn2_titan.titan.job_config import parse
    except ImportError as error:
        raise ConvertError(f"--config is {path}; reading it takes TorchTitan: {error}") from error
    from gdn2_titan.models import flavors
    from gdn2_titan.titan.errors import ConfigError
    from gdn2_titan.titan.model_args import model_args

    try:
        job_config = parse([f"--job.config_file={path}"])
    except ConfigError as error:
        raise ConvertError(f"--config: {error}") from error
    if job_config.model.name != "gdn2" or job_config.model.flavor not in flavors:
        raise ConvertError(
            f"--config is {path}, with model {job_config.model.name!r} of flavor {job_config.model.flavor!r}; it must "
            f"be 'gdn2' of flavor {', '.join(flavors)}"
        )
    return Record(model_args(job_config), job_config.to_dict())
