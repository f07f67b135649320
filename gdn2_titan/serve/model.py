"""The decoder in vLLM: its parallel layers, attention, embedding and sampler around our GDN-2 layers. Modules bear the
names of a Hugging Face folder's tensors, and where vLLM has one layer for several of them, ``STACKED`` says so."""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from gdn2_titan.models import GDN2ModelArgs
from gdn2_titan.models.attention import rotary_angles, rotate
from gdn2_titan.models.old_names import current_name

from .config import state_dtypes, state_shapes
from .mixer import ServedGatedDeltaNet2
from .steps import Pools

__all__ = ["GDN2ForCausalLM"]

# A folder's layer: vLLM's, and which part of it.
STACKED = {
    "mixer.q_proj": ("mixer.qkv_proj", "q"), "mixer.k_proj": ("mixer.qkv_proj", "k"),
    "mixer.v_proj": ("mixer.qkv_proj", "v"), "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", 1),
}  # fmt: skip


class ServedAttention(nn.Module):
    """x [n, D] -> [n, D]. window: tokens that one sees, itself included, or None for all before it."""

    def __init__(self, args: GDN2ModelArgs, window: int | None, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        self.head_dim, kv_heads = args.hidden_size // args.attn_heads, args.attn_kv_heads or args.attn_heads
        heads_here, kv_heads_here = args.attn_heads // tp_size, max(1, kv_heads // tp_size)
        self.clears = window is not None
        self.sizes = [heads_here * self.head_dim, *[kv_heads_here * self.head_dim] * 2]
        quant_config = vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            args.hidden_size, self.head_dim, args.attn_heads, kv_heads, bias=False, quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj", return_bias=False,
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            args.attn_heads * self.head_dim, args.hidden_size, bias=False, quant_config=quant_config,
            prefix=f"{prefix}.o_proj", return_bias=False,
        )  # fmt: skip
        self.attn = Attention(
            heads_here, self.head_dim, self.head_dim**-0.5, num_kv_heads=kv_heads_here,
            cache_config=vllm_config.cache_config, quant_config=quant_config, per_layer_sliding_window=window,
            prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).split(self.sizes, -1)
        q, k = (rotate(t.unflatten(-1, (-1, self.head_dim)), angles).flatten(-2) for t in (q, k))
        steps = get_forward_context().attn_metadata
        if self.clears and x.device.type == "cpu" and steps is not None:
            self._clear_blocks(steps[self.attn.layer_name].slot_mapping)
        return self.o_proj(self.attn(q, k, v))

    def _clear_blocks(self, slots):
        """Zeros in each block that a token is the first of. A block may have held states of GDN-2 layers, whose bytes
        are NaN as keys and values, and vLLM's kernel for CPUs takes blocks to their ends, times zero. vLLM clears new
        blocks itself, but for windowed layers on CPUs (seen in 0.31 and 0.32). slots: int [n], of the tokens."""
        cache = self.attn.kv_cache  # [blocks, kv_heads, tokens of a block, ...]
        size = cache.shape[2]
        cache[slots[slots % size == 0] // size] = 0


class ServedSwiGLU(nn.Module):
    def __init__(self, args: GDN2ModelArgs, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        D, size, quant_config = args.hidden_size, args.mlp_size, vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            D, [size, size], bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj", return_bias=False
        )
        self.down_proj = RowParallelLinear(
            size, D, bias=False, quant_config=quant_config, prefix=f"{prefix}.down_proj", return_bias=False
        )
        self.act = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_up_proj(x)))


class ServedBlock(nn.Module):
    def __init__(self, args: GDN2ModelArgs, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.kind = args.mixer(extract_layer_index(prefix))
        self.mixer_norm = RMSNorm(args.hidden_size, eps=args.norm_eps)
        if self.kind == "gdn2":
            self.mixer = ServedGatedDeltaNet2(args, vllm_config, f"{prefix}.mixer")
        else:
            window = args.window if self.kind == "swa" else None
            self.mixer = ServedAttention(args, window, vllm_config, f"{prefix}.mixer")
        self.mlp_norm = RMSNorm(args.hidden_size, eps=args.norm_eps)
        self.mlp = ServedSwiGLU(args, vllm_config, f"{prefix}.mlp")

    def forward(self, x: Tensor, residual: Tensor | None, angles: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [n, D] is what the block before adds to its ``residual``, which this block's norm adds up."""
        if residual is None:
            x, residual = self.mixer_norm(x), x
        else:
            x, residual = self.mixer_norm(x, residual)
        x = self.mixer(x) if self.kind == "gdn2" else self.mixer(x, angles)
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x), residual


class ServedDecoder(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.args = args = vllm_config.model_config.hf_config.model_args()
        self.attends = bool(args.mixers() - {"gdn2"})
        self.embed_tokens = PPMissingLayer()
        if get_pp_group().is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(
                args.vocab_size, args.hidden_size, quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )  # fmt: skip
        self.start_layer, self.end_layer, self.layers = make_layers(
            args.n_layers, lambda prefix: ServedBlock(args, vllm_config, prefix), prefix=f"{prefix}.layers"
        )
        last = get_pp_group().is_last_rank
        self.norm = RMSNorm(args.hidden_size, eps=args.norm_eps) if last else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], args.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:  # fmt: skip
        if get_pp_group().is_first_rank:
            x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            x, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        angles = None
        if self.attends:
            head_dim = self.args.hidden_size // self.args.attn_heads
            angles = rotary_angles(positions, head_dim, self.args.rope_theta)
        for block in islice(self.layers, self.start_layer, self.end_layer):
            x, residual = block(x, residual, angles)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x, "residual": residual})
        return self.norm(x, residual)[0]


class GDN2ForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsLoRA, SupportsPP):
    """Tokens [n] of a step and their positions [n] -> hidden states [n, D] -> logits."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.model = ServedDecoder(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )  # fmt: skip
        self.logits_processor = LogitsProcessor(config.vocab_size)
        # vLLM itself takes a linear layer that no tensor came for as it is in memory.
        self.whole_folder = vllm_config.quant_config is None and vllm_config.load_config.load_format != "dummy"
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        args = vllm_config.model_config.hf_config.model_args()
        return state_shapes(args, vllm_config.parallel_config.tensor_parallel_size)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return state_dtypes(vllm_config.model_config.dtype)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        """Of each state the whole block, where a prefix of another request goes on."""
        return (get_temporal_copy_spec,) * len(Pools._fields)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:  # fmt: skip
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Raises ValueError, naming a tensor that the model's configuration has no place for, or calls for."""
        places, loaded, seen = dict(self.named_parameters()), set(), set()
        for stored, tensor in weights:
            seen.add(current_name(stored))
            name, part = _place(current_name(stored), places)
            if is_pp_missing_parameter(name, self):
                continue
            if name not in places:
                raise ValueError(f"the folder has tensor {stored!r}, which the model's configuration has no place for")
            load = getattr(places[name], "weight_loader", default_weight_loader)
            load(places[name], tensor, *part)
            loaded.add(name)
        if self.whole_folder:
            self.whole_folder = False  # later calls bring new values of some
            for missing in sorted({one for name in places for one in _stored(name)} - seen):
                raise ValueError(f"the folder has no tensor {missing!r}, which the model's configuration calls for")
        return loaded


def _place(name, places):
    """(name of the parameter that a folder's tensor goes to, which part of it)."""
    if name not in places:
        for theirs, (ours, part) in STACKED.items():
            stacked = name.replace(f".{theirs}.", f".{ours}.")
            if stacked != name and stacked in places:
                return stacked, (part,)
    return name, ()


def _stored(name):
    """Names of the folder's tensors that make a parameter."""
    parts = [name.replace(f".{ours}.", f".{theirs}.") for theirs, (ours, _) in STACKED.items() if f".{ours}." in name]
    return parts or [name]
