"""TorchTitan 0.3's llama3 with Gated DeltaNet-2 in every second layer. ``config_registry`` trains it."""

from dataclasses import dataclass, fields, replace

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import PrepareModuleOutput, parallelize_module
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry, parallelize_llama
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.protocols.module import Module

from gdn2_titan.models import GatedDeltaNet2
from gdn2_titan.parallel import apply_mixer_tensor_parallel, shard_decays


class Mixer(GatedDeltaNet2, Module):
    """GatedDeltaNet2 as TorchTitan initialises it."""

    _init_self_parameters = GatedDeltaNet2.init_weights


class GDN2Block(Llama3TransformerBlock):
    @dataclass(kw_only=True, slots=True)
    class Config(Llama3TransformerBlock.Config):
        """A llama3 layer's: its ``attention`` says how many heads the mixer has, and of what size."""

    def __init__(self, config):
        super().__init__(config)
        del self.attention
        dim, heads = config.attention.dim, config.attention.n_heads
        self.mixer = Mixer(dim, heads, dim // heads)

    def forward(self, x, attention_masks, positions=None):
        resets = None if positions is None else positions == 0  # positions begin again in each document
        x = x + self.mixer(self.attention_norm(x), resets)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama3GDN2(Llama3Model):
    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        pass

    def verify_module_protocol(self):
        """The mixers hold plain modules of PyTorch."""


def _as(cls, config, **changes):
    return cls(**{field.name: getattr(config, field.name) for field in fields(config)} | changes)


def model_spec(flavor):
    """llama3's ModelSpec of that flavor with every second layer changed."""
    spec = model_registry(flavor)
    layers = spec.model.layers
    layers[1::2] = [_as(GDN2Block.Config, layer) for layer in layers[1::2]]
    if not torch.accelerator.is_available():  # flex attention has no backward on the CPU; on GPUs leave it out
        for layer in layers:
            layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return replace(
        spec,
        name="llama3_gdn2",
        model=_as(Llama3GDN2.Config, spec.model, layers=layers),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        state_dict_adapter=None,  # llama3's knows no names of the mixer
    )


def parallelize(model, *, parallel_dims, training, parallelism, **settings):
    for field, allowed in (("context_parallel_degree", 1), ("spmd_backend", "partial_dtensor")):
        if (value := getattr(parallelism, field)) != allowed:
            raise SystemExit(f"parallelism.{field} is {value!r}; with llama3_gdn2 it must be {allowed!r}")
    if parallel_dims.tp_enabled:
        mesh = parallel_dims.get_mesh("tp")
        for block in list(model.layers.values())[1::2]:
            apply_mixer_tensor_parallel(block.mixer, mesh)
            # Between the layers of this generation are DTensors.
            layouts = dict(output_layouts=Shard(1), desired_output_layouts=Shard(1), use_local_output=False)
            parallelize_module(block.mixer, mesh, PrepareModuleOutput(**layouts))
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    reduce_dtype = TORCH_DTYPE_MAP[training.mixed_precision_reduce]
    shard_decays(model, parallel_dims.get_mesh(names), reduce_dtype, training.enable_cpu_offload)
    settings |= dict(parallel_dims=parallel_dims, training=training, parallelism=parallelism)
    model = parallelize_llama(model, **settings)
    for unit in model.modules():  # for gloo, which has only sums; on GPUs leave this loop out
        if isinstance(unit, FSDPModule):
            unit.set_force_sum_reduction_for_comms(True)
    return model
