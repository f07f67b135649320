"""``python -m gdn2_titan.titan.check --job.config_file X.toml [overrides]``: would this job start?

Prints the rank whose log has the loss and exits with 0, or prints one sentence and exits with 2. Reads the number of
processes from NGPU.
"""

import sys


def main() -> int:
    from .checks.combinations import number_of_processes
    from .errors import ConfigError

    try:
        from . import job_config, pipeline

        config = job_config.parse(sys.argv[1:])
        job_config.validate(config)
        rank = pipeline.rank_with_loss(config.parallelism, number_of_processes())
    except ConfigError as error:
        print(f"Config error: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:  # of the import, which checks what this command line says, or of --help
        if not isinstance(end.code, str):
            raise
        print(end.code, file=sys.stderr)
        return 2
    print(rank)
    return 0


if __name__ == "__main__":
    sys.exit(main())
