"""The config functions of TorchTitan 0.3.x: ``-m torchtitan.train --module gdn2_titan.titan --config gdn2_debug``.

They say what the TOML files in train_configs/ say. ``from_toml`` trains what any TOML file says, whose path is in the
environment variable GDN2_TOML.
"""

import os

from .errors import ConfigError, refusing
from .v03.job_config import JobConfig, parse, trainer_config

__all__ = [
    "from_toml",
    "gdn2_150M",
    "gdn2_1_3B",
    "gdn2_1_3B_hybrid",
    "gdn2_400M",
    "gdn2_debug",
    "gdn2_debug_hybrid",
    "gdn2_recall",
]


@refusing
def from_toml():
    if "GDN2_TOML" not in os.environ:
        raise ConfigError("GDN2_TOML is not set; with --config from_toml it must be the path of a TOML file")
    return trainer_config(parse([f"--job.config_file={os.environ['GDN2_TOML']}"]))


def _common(flavor):
    job_config = JobConfig()
    job_config.model.flavor = flavor
    job_config.job.dump_folder = f"./outputs/{flavor}"
    job_config.metrics.enable_tensorboard = True
    job_config.lr_scheduler.decay_type = "cosine"
    job_config.lr_scheduler.min_lr_factor = 0.1
    job_config.checkpoint.enable = True
    return job_config


def _small(flavor):
    """On a CPU, in fp32."""
    job_config = _common(flavor)
    job_config.training.mixed_precision_param = "float32"
    job_config.validation.enable = True
    job_config.activation_checkpoint.mode = "none"
    job_config.debug.seed = 0
    return job_config


def _debug(flavor):
    """A few minutes: the source text of Python's standard library, byte by byte."""
    job_config = _small(flavor)
    job_config.training.dataset = job_config.validation.dataset = "stdlib"
    job_config.training.seq_len = job_config.validation.seq_len = 256
    job_config.training.steps = 400
    job_config.optimizer.lr = 2e-3
    job_config.lr_scheduler.warmup_steps = 20
    job_config.validation.freq = 100
    job_config.validation.steps = 10
    job_config.checkpoint.interval = 100
    job_config.checkpoint.keep_latest_k = 3
    return trainer_config(job_config)


def _large(flavor):
    """The paper's recipe on eight GPUs, with a tokenizer in ./assets/tokenizer: 0.5M tokens a batch."""
    job_config = _common(flavor)
    job_config.model.hf_assets_path = "./assets/tokenizer"
    job_config.training.dataset = "HuggingFaceFW/fineweb-edu"
    job_config.training.global_batch_size = 128
    job_config.training.seq_len = 4096
    job_config.optimizer.lr = 4e-4
    job_config.compile.enable = True
    job_config.activation_checkpoint.mode = "selective"
    job_config.activation_checkpoint.selective_ac_option = "op"
    job_config.gdn2.statistics_freq = 500
    job_config.checkpoint.keep_latest_k = 5
    job_config.checkpoint.async_mode = "async"
    return job_config


def _of_10B_tokens(flavor, local_batch_size):
    job_config = _large(flavor)
    job_config.training.local_batch_size = local_batch_size
    job_config.training.steps = 19073
    job_config.lr_scheduler.warmup_steps = 191
    job_config.data.hf_subset = "sample-10BT"
    job_config.checkpoint.interval = 500
    return trainer_config(job_config)


def _of_100B_tokens(flavor):
    job_config = _large(flavor)
    job_config.training.local_batch_size = 4
    job_config.training.steps = 190735
    job_config.lr_scheduler.warmup_steps = 1907
    job_config.data.hf_subset = "sample-100BT"
    job_config.checkpoint.interval = 1000
    return trainer_config(job_config)


def gdn2_debug():
    return _debug("debug")


def gdn2_debug_hybrid():
    return _debug("debug_hybrid")


def gdn2_recall():
    """Multi-query associative recall; the other tasks' files are in train_configs/recall."""
    job_config = _small("recall")
    job_config.job.dump_folder = "./outputs/recall/mqar"
    for part in (job_config.training, job_config.validation):
        part.dataset, part.local_batch_size, part.seq_len = "mqar", 32, 128
    job_config.training.steps = 1500
    job_config.task.pairs = [4, 8, 16]
    job_config.task.validation_pairs = [4, 8, 16, 24]
    job_config.task.validation_lengths = [128, 256]
    job_config.optimizer.lr = 3e-3
    job_config.lr_scheduler.warmup_steps = 50
    job_config.metrics.log_freq = 50
    job_config.gdn2.statistics_freq = 250
    job_config.validation.freq = 250
    job_config.validation.steps = 4
    job_config.checkpoint.interval = 500
    job_config.checkpoint.keep_latest_k = 2
    return trainer_config(job_config)


def gdn2_150M():
    return _of_10B_tokens("150M", local_batch_size=16)


def gdn2_400M():
    return _of_10B_tokens("400M", local_batch_size=8)


def gdn2_1_3B():
    return _of_100B_tokens("1.3B")


def gdn2_1_3B_hybrid():
    return _of_100B_tokens("1.3B_hybrid")
