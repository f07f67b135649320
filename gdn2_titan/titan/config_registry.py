"""The config functions of TorchTitan 0.3.x: ``-m torchtitan.train --module gdn2_titan.titan --config gdn2_debug``.

``from_toml`` trains what a TOML file says, whose path is in the environment variable GDN2_TOML.
"""

import os

from .errors import refusing
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
    return trainer_config(parse([f"--job.config_file={os.environ['GDN2_TOML']}"]))


def _small(flavor, dataset, seq_len):
    """A few minutes on a CPU."""
    job_config = JobConfig()
    job_config.model.flavor = flavor
    job_config.training.dataset = job_config.validation.dataset = dataset
    job_config.training.seq_len = job_config.validation.seq_len = seq_len
    job_config.training.steps = 400
    job_config.training.mixed_precision_param = "float32"
    job_config.optimizer.lr = 2e-3
    job_config.lr_scheduler.warmup_steps = 20
    job_config.lr_scheduler.decay_type = "cosine"
    job_config.lr_scheduler.min_lr_factor = 0.1
    job_config.validation.enable = True
    job_config.validation.freq = 100
    job_config.validation.steps = 10
    job_config.activation_checkpoint.mode = "none"
    job_config.debug.seed = 0
    return trainer_config(job_config)


def _large(flavor):
    """The paper's recipe on eight GPUs, with a tokenizer in ./assets/tokenizer."""
    job_config = JobConfig()
    job_config.model.flavor = flavor
    job_config.model.hf_assets_path = "./assets/tokenizer"
    job_config.training.dataset = "HuggingFaceFW/fineweb-edu"
    job_config.training.local_batch_size = 4
    job_config.training.global_batch_size = 128
    job_config.training.seq_len = 4096
    job_config.training.steps = 190735
    job_config.data.hf_subset = "sample-100BT"
    job_config.optimizer.lr = 4e-4
    job_config.lr_scheduler.warmup_steps = 1907
    job_config.lr_scheduler.decay_type = "cosine"
    job_config.lr_scheduler.min_lr_factor = 0.1
    job_config.compile.enable = True
    job_config.activation_checkpoint.mode = "selective"
    job_config.activation_checkpoint.selective_ac_option = "op"
    return trainer_config(job_config)


def gdn2_debug():
    return _small("debug", "stdlib", 256)


def gdn2_debug_hybrid():
    return _small("debug_hybrid", "stdlib", 256)


def gdn2_recall():
    return _small("recall", "mqar", 128)


def gdn2_150M():
    return _large("150M")


def gdn2_400M():
    return _large("400M")


def gdn2_1_3B():
    return _large("1.3B")


def gdn2_1_3B_hybrid():
    return _large("1.3B_hybrid")
