"""TorchTitan 0.3's timeouts of process groups on a torch before 2.14."""

from datetime import timedelta

import torch.distributed as dist
from torchtitan.distributed import utils as dist_utils

__all__ = ["settle_timeouts"]


def settle_timeouts():
    """Replace the function by which TorchTitan shortens timeouts after the first step: stock, it needs torch 2.14.
    Once per process, before training; again is harmless."""
    dist_utils.set_pg_timeouts = _set_timeouts


def _set_timeouts(timeout: timedelta, parallel_dims):
    dist.barrier(device_ids=None if dist_utils.device_type == "cpu" else [dist_utils.device_module.current_device()])
    dist_utils.device_module.synchronize()
    groups = [mesh.get_group() for mesh in parallel_dims.get_all_one_dimensional_meshes().values()] + [None]
    for group in groups:
        if hasattr(dist, "set_timeout"):
            dist.set_timeout(timeout, group)
        else:
            dist.distributed_c10d._set_pg_timeout(timeout, group)
