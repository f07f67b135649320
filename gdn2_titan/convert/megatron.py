"""The tensors' names of Megatron-Core's GPT model with Gated DeltaNet-2 layers (its ``experimental_attention_variant``
"gdn2"), as its sources of August 2026 with Transformer Engine have them.

A GDN-2 layer has one projection without bias, ``in_proj``: query, key, value, output gate, decay, erase and write gate
below each other, decay and output gate of full rank; one convolution over query, key and value; and the norm before it
inside ``in_proj``. Softmax layers hold for each key head its queries, its key and its value, and an MLP its gate above
what it multiplies. The vocabulary may be padded, which is cut off.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import torch

from gdn2_titan.models import GDN2ModelArgs
from gdn2_titan.models.args import SOFTMAX
from gdn2_titan.models.checks import value_head_dim

from .errors import ConvertError
from .mapping import Part, Source, tensors_of

__all__ = ["WithoutExtraStates", "args_of_megatron", "check_one_rank", "from_megatron_mapping"]

_FIXED = {
    "erase_gate": "channel", "write_gate": "channel", "tied_gates": False, "decay": "channel", "lower_bound": None,
    "allow_neg_eigval": False, "output_gate": "silu", "content_gate": False,
}  # fmt: skip
_VOCABULARY = {"tok_embeddings.weight": "embedding.word_embeddings.weight", "lm_head.weight": "output_layer.weight"}
_GDN2 = {
    "mixer_norm.weight": "in_proj.layer_norm_weight", "mixer.decay.A_log": "A_log", "mixer.decay.dt_bias": "dt_bias",
    "mixer.o_norm.weight": "out_norm.weight", "mixer.o_proj.weight": "out_proj.weight",
}  # fmt: skip
_SOFTMAX = {"mixer_norm.weight": "linear_qkv.layer_norm_weight", "mixer.o_proj.weight": "linear_proj.weight"}
_MLP = {"mlp_norm.weight": "linear_fc1.layer_norm_weight", "mlp.down_proj.weight": "linear_fc2.weight"}


def args_of_megatron(args: GDN2ModelArgs) -> GDN2ModelArgs:
    """``args`` with the projections of that layer, which have full rank.

    Raises:
        ConvertError: the model has what that layer has not.
    """
    if others := args.mixers() - {"gdn2", *SOFTMAX}:
        raise ConvertError(f"layer_pattern has {', '.join(map(repr, sorted(others)))}; Megatron-Core's has none")
    for name, value in _FIXED.items():
        if getattr(args, name) != value:
            raise ConvertError(f"{name} is {getattr(args, name)!r}; Megatron-Core's layer has {value!r}")
    return dataclasses.replace(args, decay_rank=None, gate_rank=None)


def check_one_rank(path: Path) -> None:
    """Raise ConvertError where ``path``, in a folder such as ``mp_rank_00``, is one of several ranks' files."""
    if re.fullmatch(r"mp_rank_\d+(_\d+)*", path.absolute().parent.name):
        ranks = sorted(folder.name for folder in path.absolute().parents[1].glob("mp_rank_*"))
        if len(ranks) > 1:
            raise ConvertError(f"{path} is beside {ranks[1]!r}; the model must have been saved by one rank alone")


class WithoutExtraStates:
    """A checkpoint less what Transformer Engine keeps beside parameters."""

    def __init__(self, source: Source) -> None:
        self.path, self.read = source.path, source.read
        self.tensors = {name: x for name, x in source.tensors.items() if not name.endswith("_extra_state")}


def _rows(sizes: dict[str, int], name: str, shape: torch.Size) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of a matrix with blocks of rows below each other, {name: rows}, that of ``name``, in this shape."""

    def of(tensor):
        return tensor.split([*sizes.values()])[[*sizes].index(name)].reshape(shape)

    return of


def _head_rows(args: GDN2ModelArgs, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of q, k and v in one matrix, for each key head its queries, its key and its value, those of ``name``."""
    groups = args.attn_kv_heads or args.attn_heads
    queries, size = args.attn_heads // groups, args.hidden_size // args.attn_heads

    def of(tensor):
        heads = tensor.view(groups, queries + 2, size, args.hidden_size)
        picked = {"q": heads[:, :queries], "k": heads[:, queries], "v": heads[:, queries + 1]}[name]
        return picked.reshape(-1, args.hidden_size)

    return of


def _mixer(args: GDN2ModelArgs, kind: str, name: str, shape: torch.Size) -> Part:
    """Where ``name`` of a block, which is not of its MLP, comes from; the name there is without the block's."""
    module = name.split(".")[1].removesuffix("_proj").removesuffix("_conv1d")
    if kind != "gdn2":
        return Part(_SOFTMAX[name]) if name in _SOFTMAX else Part("linear_qkv.weight", _head_rows(args, module))
    if name in _GDN2:
        return Part(_GDN2[name], lambda tensor: tensor.reshape(shape))
    if name == "mixer.gate_proj.bias":  # there is none
        return Part("in_proj.weight", lambda tensor: tensor.new_zeros(shape))
    key = args.num_heads * args.head_dim
    value = (args.num_v_heads or args.num_heads) * value_head_dim(args.head_dim, args.expand_v)
    convolved = {"q": key, "k": key, "v": value}
    if "_conv1d" in name:
        return Part("conv1d.weight", _rows(convolved, module, shape))
    sizes = convolved | {"gate": value, "decay": key, "erase": key, "write": value}
    return Part("in_proj.weight", _rows(sizes, module, shape))


def from_megatron_mapping(args: GDN2ModelArgs) -> dict[str, Part]:
    """{name here: Part of a Megatron-Core checkpoint}. args: of ``args_of_megatron``."""
    mapping = {}
    for name, tensor in tensors_of(args).items():
        if name in _VOCABULARY:
            mapping[name] = Part(_VOCABULARY[name], lambda tensor: tensor[: args.vocab_size])
            continue
        if name == "norm.weight":
            mapping[name] = Part("decoder.final_layernorm.weight")
            continue
        _, layer, rest = name.split(".", 2)
        block = f"decoder.layers.{layer}"
        if rest in _MLP:
            mapping[name] = Part(f"{block}.mlp.{_MLP[rest]}")
        elif rest.startswith("mlp."):
            sizes = {"gate": args.mlp_size, "up": args.mlp_size}
            of = _rows(sizes, rest.split(".")[1].removesuffix("_proj"), tensor.shape)
            mapping[name] = Part(f"{block}.mlp.linear_fc1.weight", of)
        else:
            part = _mixer(args, args.mixer(int(layer)), rest, tensor.shape)
            mapping[name] = Part(f"{block}.self_attention.{part.name}", part.of)
    return mapping
