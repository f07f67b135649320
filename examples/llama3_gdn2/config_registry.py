"""TorchTitan 0.3: python -m torch.distributed.run --nproc_per_node=1 -m torchtitan.train \
--module examples.llama3_gdn2 --config llama3_gdn2_debug"""

from dataclasses import replace

from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.models.llama3.config_registry import llama3_debugmodel

from gdn2_titan.titan import settle_device
from gdn2_titan.titan.byte_tokenizer import BYTE_TOKENIZER_DIR
from gdn2_titan.titan.corpus import load_source
from gdn2_titan.titan.v03.activation_checkpoint import SavedOpsAC
from gdn2_titan.titan.v03.trainer import settle_timeouts

from .v03 import model_spec

settle_device()  # the CPU where there is no accelerator; on GPUs leave it out
settle_timeouts()  # for torch before 2.14

# TorchTitan's loader over a corpus that every Python has, or over local files: dataloader.dataset_path.
DATASETS["stdlib"] = DatasetConfig(
    path="",
    loader=lambda path: load_source("training", "files" if path else "stdlib", path or None, held_out=False),
    sample_processor=lambda sample: sample["text"],
)


def llama3_gdn2_debug():
    config = llama3_debugmodel()
    config.model_spec = model_spec("debugmodel")
    config.hf_assets_path = str(BYTE_TOKENIZER_DIR)
    config.dump_folder = "./outputs/llama3_gdn2"
    config.dataloader.dataset = "stdlib"
    config.training.local_batch_size = 4
    config.training.seq_len = 128
    config.training.steps = 40
    config.training.mixed_precision_param = "float32"
    config.training.disable_cuda_graphs = True  # the mixer's ops are not captured
    config.lr_scheduler.warmup_steps = 10
    config.parallelism.spmd_backend = "partial_dtensor"  # by the other, every parameter wants types
    config.activation_checkpoint = SavedOpsAC.Config()  # selective by op: keeps what the mixer gave
    decayed = config.optimizer.param_groups[0]
    kept = replace(decayed, pattern=r"A_log|dt_bias", optimizer_kwargs=decayed.optimizer_kwargs | {"weight_decay": 0.0})
    config.optimizer.param_groups.insert(0, kept)  # the first pattern that matches counts
    return config
