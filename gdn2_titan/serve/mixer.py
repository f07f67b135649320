"""The layer of ``gdn2_titan.models`` with vLLM's parallel linear layers for its projections and vLLM's blocks for its
states. A rank of tensor parallelism holds some of the heads."""

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from gdn2_titan.models import GatedDeltaNet2, GDN2ModelArgs
from gdn2_titan.models.decay import DECAYS

from .config import state_dtypes, state_shapes
from .metadata import GDN2AttentionBackend
from .steps import Pools, mix

__all__ = ["ServedGatedDeltaNet2"]

# Projections whose output no rank has a part of: the inner factors of decay and output gate.
WHOLE = ("decay_low_proj", "gate_low_proj")


class ServedGatedDeltaNet2(GatedDeltaNet2, MambaBase):
    """x [n, D] -> [n, D], the tokens of a step of vLLM's engine. Parameters bear the names of GatedDeltaNet2's."""

    def __init__(self, args: GDN2ModelArgs, vllm_config: VllmConfig, prefix: str) -> None:
        with torch.device("meta"):
            super().__init__(args.hidden_size, **args.gdn2_options())
        del self.statistics
        self.args, self.prefix, self.dtype = args, prefix, vllm_config.model_config.dtype
        self.tp_size = get_tensor_model_parallel_world_size()
        for name, linear in [*self.named_children()]:
            if isinstance(linear, nn.Linear):
                setattr(self, name, _parallel(name, linear, vllm_config.quant_config, prefix))
        self.heads = args.num_heads // self.tp_size
        self.v_heads = (args.num_v_heads or args.num_heads) // self.tp_size
        for conv1d in (self.q_conv1d, self.k_conv1d, self.v_conv1d):
            _hold(conv1d, "weight", self.tp_size)
        for name in () if self.decay is None else DECAYS:
            _hold(self.decay, name, self.tp_size)
        _hold(self.o_norm, "weight", 1)
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"prefix is {prefix!r}; it must be another one, a layer of this model bears it")
        layers[prefix] = self
        self.kv_cache = ()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        g, erase, write = self.gate_inputs(x, self.heads, self.v_heads)
        # Zeros where tokens are padding: what follows may take a maximum over all of them, to quantize.
        out = torch.zeros((len(x), self.v_heads, self.head_v_dim), dtype=x.dtype, device=x.device)
        steps = get_forward_context().attn_metadata  # by the layers' prefixes; None while vLLM measures memory
        pools = None if steps is None else Pools(*self.kv_cache)
        mix(self, q, k, v, g, erase, write, pools, None if steps is None else steps[self.prefix], out)
        gate = self.gate_proj(x if self.gate_low_proj is None else self.gate_low_proj(x))
        return self.output(out, gate)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shapes(self.args, self.tp_size)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtypes(self.dtype)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR  # its name in what processes tell each other

    def get_attn_backend(self) -> type[AttentionBackend]:
        return GDN2AttentionBackend


def _parallel(name, linear, quant_config, prefix):
    """vLLM's layer in place of a Linear on the meta device."""
    sizes = linear.in_features, linear.out_features
    made = {"o_proj": RowParallelLinear}.get(name, ReplicatedLinear if name in WHOLE else ColumnParallelLinear)
    options = {"bias": linear.bias is not None, "quant_config": quant_config, "prefix": f"{prefix}.{name}"}
    return made(*sizes, **options, return_bias=False)


def _hold(module, name, tp_size):
    """Memory for a parameter that is on the meta device, or for this rank's part of its rows."""
    whole = getattr(module, name)
    part = torch.empty((whole.shape[0] // tp_size, *whole.shape[1:]), dtype=whole.dtype)
    setattr(module, name, nn.Parameter(part, requires_grad=False))
    if tp_size > 1:
        set_weight_attrs(getattr(module, name), {"weight_loader": sharded_weight_loader(0)})
