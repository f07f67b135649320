"""Fully sharded data parallelism (FSDP2) for the decoder: one unit per block."""

import functools

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from gdn2_titan.models.decay import DecayParameters

__all__ = ["apply_fsdp", "shard_decays", "sum_gradients"]


def apply_fsdp(
    model: nn.Module, mesh: DeviceMesh, param_dtype: torch.dtype, reduce_dtype: torch.dtype,
    reshard_after_forward: bool = True, reshard_last: bool = False, cpu_offload: bool = False,
) -> None:  # fmt: skip
    """Shard a ``GDN2Model`` in place over ``mesh`` (1-D, or 2-D replicate x shard for HSDP).

    The decays are sharded by ``shard_decays``.

    Args:
        param_dtype: that units compute in, but for the decays.
        reduce_dtype: that gradients are added up in.
        reshard_after_forward: free a block's gathered parameters after its forward.
        reshard_last: the head's too; they stay by default, as the backward needs them first.
        cpu_offload: keep shards, gradients and states of the optimizer on the CPU.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    shard = functools.partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=_offload(mesh, cpu_offload))
    if model.tok_embeddings is not None:
        shard(model.tok_embeddings, reshard_after_forward=reshard_after_forward)
    shard_decays(model, mesh, reduce_dtype, cpu_offload)
    for block in model.layers.values():
        shard(block, reshard_after_forward=reshard_after_forward)
    head = [module for module in (model.norm, model.lm_head) if module is not None]
    if head:
        shard(head, reshard_after_forward=reshard_last)
    shard(model)
    if mesh.device_type == "cpu":
        for unit in _units(model):
            unit.set_force_sum_reduction_for_comms(True)  # gloo has neither averages nor pre-multiplied sums


def shard_decays(model: nn.Module, mesh: DeviceMesh, reduce_dtype: torch.dtype, cpu_offload: bool = False) -> None:
    """Shard A_log and dt_bias of all ``DecayParameters`` in anybody's model, in place, before
    ``fully_shard`` takes the modules around them and the model itself.

    They form one unit that stays in fp32 whatever the others compute in: a decay that is rounded to bf16 is another
    decay. It is gathered once, before the first block. reduce_dtype, cpu_offload: as in ``apply_fsdp``.
    """
    decays = [module for module in model.modules() if isinstance(module, DecayParameters)]
    if not decays:
        return
    exact, offload = MixedPrecisionPolicy(reduce_dtype=reduce_dtype), _offload(mesh, cpu_offload)
    fully_shard(decays, mesh=mesh, mp_policy=exact, offload_policy=offload, reshard_after_forward=False)
    # The hooks of a unit inside a block would break the graph of a compiled block. So the layers read these parameters
    # without calling their modules, and the unit is gathered out here, after the model's own hook, which fully_shard
    # puts first; backward returns it to its shards like any other.
    model.register_forward_pre_hook(lambda *_: decays[0].unshard())


def _offload(mesh, cpu_offload):
    return CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()


def sum_gradients(model: nn.Module) -> None:
    """Add gradients over ranks instead of averaging: for losses that are already divided by the global token count."""
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)


def _units(model):
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
