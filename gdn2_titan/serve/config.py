"""What vLLM serves of this model, checked before it is built, and what it asks of a config."""

from typing import TYPE_CHECKING

import torch
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from gdn2_titan.models import GDN2ModelArgs
from gdn2_titan.models.args import SOFTMAX
from gdn2_titan.models.checks import value_head_dim
from gdn2_titan.ops.elementwise import BATCH_INVARIANT

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["GDN2Architecture", "ServedGDN2", "state_dtypes", "state_shapes"]


def state_shapes(args: GDN2ModelArgs, tp_size: int) -> tuple[tuple[int, ...], ...]:
    """Of one sequence on one rank, in the order of ``steps.Pools``. The memory is first: what is fp32 must not lie at
    an odd multiple of two bytes."""
    heads, v_heads = args.num_heads // tp_size, (args.num_v_heads or args.num_heads) // tp_size
    head_v_dim, tail = value_head_dim(args.head_dim, args.expand_v), args.conv_size - 1
    key_size = heads * args.head_dim
    return (v_heads, args.head_dim, head_v_dim), (key_size, tail), (key_size, tail), (v_heads * head_v_dim, tail)


def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of ``state_shapes`` for a model of ``dtype``."""
    return torch.float32, dtype, dtype, dtype


class GDN2Architecture(ModelArchConfigConvertorBase):
    def get_head_size(self) -> int:
        """Of softmax layers; the config's head_dim is that of GDN-2 layers."""
        return self.hf_text_config.hidden_size // self.hf_text_config.attn_heads


class ServedGDN2(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Raises ValueError, one sentence with the option, its value and what is allowed, for what is not served."""
        args = vllm_config.model_config.hf_config.model_args()
        if others := args.mixers() - {"gdn2", *SOFTMAX}:
            raise ValueError(
                f"layer_pattern is {list(args.layer_pattern)}; to be served it must be without "
                f"{', '.join(map(repr, sorted(others)))}, whose states vLLM is not given"
            )
        if "gdn2" not in args.mixers():
            raise ValueError(f"layer_pattern is {list(args.layer_pattern)}; to be served it must have 'gdn2' layers")
        if args.content_gate:
            raise ValueError("content_gate is True; to be served it must be false, vLLM is not given its states")
        tp_size = vllm_config.parallel_config.tensor_parallel_size
        heads = {"num_heads": args.num_heads, "num_v_heads": args.num_v_heads or args.num_heads}
        if args.mixers() - {"gdn2"}:
            heads["attn_heads"] = args.attn_heads
        for name, count in (heads | {"mlp_size": args.mlp_size}).items():
            if count % tp_size:
                raise ValueError(f"tensor_parallel_size is {tp_size}; it must divide {name} = {count}")
        kv_heads = args.attn_kv_heads or args.attn_heads
        if "attn_heads" in heads and kv_heads % tp_size and tp_size % kv_heads:
            raise ValueError(
                f"tensor_parallel_size is {tp_size}; it must divide attn_kv_heads = {kv_heads}, or be a multiple of it"
            )
        if args.backend == BATCH_INVARIANT:
            raise ValueError(
                f"backend is {args.backend!r}; to be served it must be another one, vLLM's layers are its own"
            )
        if vllm_config.speculative_config is not None:
            method = vllm_config.speculative_config.method
            raise ValueError(
                f"speculative_config has method {method!r}; it must be left out, the states of GDN-2 layers cannot be "
                "taken back to an earlier token"
            )
        cache = vllm_config.cache_config
        if cache.mamba_ssm_cache_dtype not in ("auto", "float32"):
            raise ValueError(
                f"mamba_ssm_cache_dtype is {cache.mamba_ssm_cache_dtype!r}; it must be 'float32' or left out, the "
                "memory of GDN-2 layers is kept in fp32"
            )
        if cache.mamba_cache_dtype != "auto":
            raise ValueError(
                f"mamba_cache_dtype is {cache.mamba_cache_dtype!r}; it must be left out, the convolutions' inputs are "
                "kept in the model's dtype"
            )
