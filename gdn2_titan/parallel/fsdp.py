"""Fully sharded data parallelism (FSDP2) for the decoder: one unit per block."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from gdn2_titan.models.layer import DecayParameters

__all__ = ["apply_fsdp", "sum_gradients"]


def apply_fsdp(
    model,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool = True,
    reshard_last: bool = False,
    cpu_offload: bool = False,
):
    """Shard a ``GDN2Model`` in place over ``mesh`` (1-D, or 2-D replicate x shard for HSDP).

    A_log and dt_bias of all layers form one unit of their own that stays in fp32 whatever ``param_dtype`` is: a decay
    that is rounded to bf16 is another decay. It is gathered once, before the first block. reshard_last: free the head's
    parameters after forward too; they are needed next anyway.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    common = {"mesh": mesh}
    if cpu_offload:
        common["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    exact = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    if model.tok_embeddings is not None:
        fully_shard(model.tok_embeddings, **common, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    decays = [module for module in model.modules() if isinstance(module, DecayParameters)]
    if decays:
        fully_shard(decays, **common, mp_policy=exact, reshard_after_forward=False)
    for block in model.layers.values():
        fully_shard(block, **common, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    head = [module for module in (model.norm, model.lm_head) if module is not None]
    if head:
        fully_shard(head, **common, mp_policy=policy, reshard_after_forward=reshard_last)
    fully_shard(model, **common, mp_policy=policy)
    if decays:
        # The hooks of a unit inside a block would break the graph of a compiled block. So the layers read these
        # parameters without calling their modules, and the unit is gathered out here; backward returns it to its
        # shards like any other.
        model.register_forward_pre_hook(lambda *_: decays[0].unshard())
    if mesh.device_type == "cpu":
        for unit in _units(model):
            unit.set_force_sum_reduction_for_comms(True)  # gloo has neither averages nor pre-multiplied sums


def sum_gradients(model):
    """Add gradients over ranks instead of averaging: for losses that are already divided by the global token count."""
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)


def _units(model):
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
