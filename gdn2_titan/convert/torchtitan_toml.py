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
        from torchtitan.config import ConfigManager
    except ImportError as error:
        raise ConvertError(f"--config is {path}; reading it takes TorchTitan: {error}") from error
    from gdn2_titan.titan.errors import ConfigError
    from gdn2_titan.titan.model_args import titan_flavors
    from gdn2_titan.titan.sections import JobConfig
    from gdn2_titan.titan.toml_check import check_toml

    try:
        check_toml(path, JobConfig)
    except ConfigError as error:
        raise ConvertError(f"--config: {error}") from error
    job_config = ConfigManager(JobConfig).parse_args([f"--job.config_file={path}"])
    flavors = titan_flavors()
    if job_config.model.name != "gdn2" or job_config.model.flavor not in flavors:
        raise ConvertError(
            f"--config is {path}, with model {job_config.model.name!r} of flavor {job_config.model.flavor!r}; it must "
            f"be 'gdn2' of flavor {', '.join(flavors)}"
        )
    args = flavors[job_config.model.flavor]
    args.update_from_config(job_config)
    return Record(args, job_config.to_dict())
