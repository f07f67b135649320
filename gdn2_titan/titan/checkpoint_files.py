"""What lies beside the weights that TorchTitan saves: what they were trained with, and the rest of a Hugging Face
folder."""

import os
from pathlib import Path

import torch.distributed as dist

from gdn2_titan.convert.checkpoint_info import CheckpointInfo, write_info
from gdn2_titan.convert.hf_folder import write_model_files

__all__ = ["write_checkpoint_files"]


def _saves(job_config, step):
    """Whether TorchTitan writes a checkpoint at the end of a step."""
    checkpoint = job_config.checkpoint
    if not checkpoint.enable or checkpoint.load_only:
        return False
    first = step == 1 and checkpoint.enable_first_step_checkpoint
    return first or step == job_config.training.steps or step % checkpoint.interval == 0


def write_checkpoint_files(job_config, model_args, step):
    """In a step that ends with a checkpoint, and on rank 0: gdn2.json in the checkpoints' folder; where the checkpoint
    will be a Hugging Face one, config.json, tokenizer and model card in its own.

    Not earlier: TorchTitan takes a folder of checkpoints for one to resume from, and forgets its initial_load_path.
    """
    if not _saves(job_config, step) or (dist.is_initialized() and dist.get_rank()):
        return
    checkpoint = job_config.checkpoint
    folder = Path(job_config.job.dump_folder) / checkpoint.folder
    folder.mkdir(parents=True, exist_ok=True)
    info = CheckpointInfo(model_args, job_config.to_dict())
    write_info(folder, info)
    if step == job_config.training.steps and checkpoint.last_save_in_hf:
        own = folder / f"step-{step}"
        own.mkdir(exist_ok=True)
        write_model_files(own, info, os.path.abspath(job_config.model.hf_assets_path), checkpoint.export_dtype, step)
