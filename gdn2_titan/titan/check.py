"""``python -m gdn2_titan.titan.check --job.config_file X.toml [overrides]``: would this job start?

Prints the rank whose log has the loss and exits with 0, or prints one sentence and exits with 2. Reads the number of
processes from NGPU.
"""

import os
import sys


def main():
    from . import errors, job_config, pipeline

    try:
        config = job_config.parse(sys.argv[1:])
        job_config.validate(config)
    except errors.ConfigError as error:
        print(f"Config error: {error}", file=sys.stderr)
        return 2
    print(pipeline.rank_with_loss(config.parallelism, int(os.environ.get("NGPU", "1"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
