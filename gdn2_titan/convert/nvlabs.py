"""The tensors' names and shapes of the authors' release, and of the public weights in its layout.

A GDN-2 layer has the names of flash-linear-attention's. A softmax layer has q, k and v in one matrix, whose rows are
for each key/value head its queries, its key, its value; positions turn its heads by halves, as here. ``layout`` names
every tensor of a model.
"""

from collections.abc import Mapping
from typing import Any

import torch

from gdn2_titan.models import GDN2ModelArgs

from .errors import ConvertError
from .fla import check_layer, from_fla_mapping, to_fla_mapping
from .mapping import Part, Renamed, Source, tensors_of

__all__ = ["Unwrapped", "check_layout", "from_nvlabs_mapping", "hparams_of", "layout", "to_nvlabs"]

# What a wrapper of the module put before its names.
_WRAPPERS = ("_forward_module.", "_orig_mod.", "module.")
_OUTSIDE = {
    "tok_embeddings.weight": "transformer.wte.weight", "norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}  # fmt: skip
_BLOCK = {
    "mixer_norm.weight": "norm_1.weight", "mlp_norm.weight": "norm_2.weight",
    "mlp.gate_proj.weight": "mlp.swiglu.w1.weight", "mlp.up_proj.weight": "mlp.swiglu.w2.weight",
    "mlp.down_proj.weight": "mlp.swiglu.w3.weight",
}  # fmt: skip
_QKV = ("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight")
# The one value that each of these has in the authors' layer.
_FIXED = {
    "erase_gate": "channel", "write_gate": "channel", "tied_gates": False, "decay": "channel", "output_gate": "silu",
    "allow_neg_eigval": False, "lower_bound": None, "content_gate": False,
}  # fmt: skip


class Unwrapped:
    """A checkpoint whose tensors have their names without ``_forward_module.`` and the like."""

    def __init__(self, source: Source) -> None:
        self.path, self._source, self._stored = source.path, source, {}
        for name in source.tensors:
            bare = name
            while bare.startswith(_WRAPPERS):
                bare = bare.split(".", 1)[1]
            if bare in self._stored:
                raise ConvertError(f"{source.path} has both {self._stored[bare]!r} and {name!r}; they are one tensor")
            self._stored[bare] = name
        self.tensors = {bare: source.tensors[name] for bare, name in self._stored.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(self._stored[name])


def _groups(args: GDN2ModelArgs) -> tuple[int, int, int]:
    """(key/value heads, query heads of each, head size) of the softmax layers."""
    groups = args.attn_kv_heads or args.attn_heads
    return groups, args.attn_heads // groups, args.hidden_size // args.attn_heads


def _split(args: GDN2ModelArgs, index: int):
    """Picks the rows of q (0), k (1) or v (2) out of the one matrix."""
    groups, queries, size = _groups(args)

    def of(tensor):
        heads = tensor.view(groups, queries + 2, size, args.hidden_size)
        return heads.split([queries, 1, 1], dim=1)[index].reshape(-1, args.hidden_size)

    return of


class _Joined:
    """A checkpoint here whose softmax layers have q, k and v in one matrix, ``layers.N.mixer.qkv``."""

    def __init__(self, source: Source, args: GDN2ModelArgs) -> None:
        self.path, self._source, self._args = source.path, source, args
        self._parts, tensors = {}, dict(source.tensors)
        for layer in range(args.n_layers):
            if args.mixer(layer) != "gdn2":
                name = f"layers.{layer}.mixer.qkv"
                self._parts[name] = [f"layers.{layer}.{part}" for part in _QKV]
                tensors[name] = self._join([tensors.pop(part) for part in self._parts[name]])
        self.tensors = tensors

    def _join(self, parts):
        groups, _, size = _groups(self._args)
        heads = [part.view(groups, -1, size, self._args.hidden_size) for part in parts]
        return torch.cat(heads, dim=1).view(-1, self._args.hidden_size)

    def read(self, name: str) -> torch.Tensor:
        if name in self._parts:
            return self._join([self._source.read(part) for part in self._parts[name]])
        return self._source.read(name)


def _their_block(name: str) -> str:
    """``transformer.h.N`` of ``layers.N...`` or flash-linear-attention's ``model.layers.N...``."""
    return f"transformer.h.{name.removeprefix('model.').split('.', 2)[1]}"


def to_nvlabs(source: Source, args: GDN2ModelArgs, dtype: torch.dtype | None = None) -> Renamed:
    """A checkpoint by names here, by the authors' names. dtype: as of ``Renamed``.

    Raises:
        ConvertError: the model has what the authors' has not.
    """
    _check_expressible(args)
    joined, fla, mapping = _Joined(source, args), to_fla_mapping(args), {}
    theirs = {part.name: (name, part.of) for name, part in fla.items()}
    for name in joined.tensors:
        if name in _OUTSIDE:
            mapping[_OUTSIDE[name]] = Part(name)
            continue
        block, rest = _their_block(name), name.split(".", 2)[2]
        if rest in _BLOCK:
            mapping[f"{block}.{_BLOCK[rest]}"] = Part(name)
        elif rest == "mixer.qkv":
            mapping[f"{block}.attn.attn.weight"] = Part(name)
        elif args.mixer(int(name.split(".", 2)[1])) == "gdn2":
            there, of = theirs[name]
            mapping[f"{block}.{there.split('.', 3)[3]}"] = Part(name, of)
        else:
            mapping[f"{block}.attn.proj.weight"] = Part(name)
    return Renamed(joined, mapping, dtype)


class _Shapes:
    """A checkpoint of a model, of which there are shapes only."""

    path = None

    def __init__(self, args: GDN2ModelArgs) -> None:
        self.tensors = tensors_of(args)


def layout(args: GDN2ModelArgs) -> dict[str, torch.Tensor]:
    """{the authors' name: meta tensor} of a model's checkpoint.

    Raises:
        ConvertError: no model can be built from args, or it has what the authors' has not.
    """
    return to_nvlabs(_Shapes(args), args).tensors


def check_layout(source: Source, args: GDN2ModelArgs) -> None:
    """Raise ConvertError unless a checkpoint has exactly the tensors of ``layout(args)``, in their shapes, of any
    floating-point dtype."""
    expected = layout(args)
    for name in expected:
        if name not in source.tensors:
            raise ConvertError(f"{source.path} has no tensor {name!r}, which its model calls for")
    for name, tensor in source.tensors.items():
        if name not in expected:
            raise ConvertError(f"{source.path} has tensor {name!r}, which its model has no place for")
        if not tensor.is_floating_point():
            raise ConvertError(f"{source.path} has tensor {name!r} of {tensor.dtype}; it must be of floating point")
        if tensor.shape != expected[name].shape:
            raise ConvertError(
                f"{source.path} has tensor {name!r} of shape {[*tensor.shape]}; its model makes it "
                f"{[*expected[name].shape]}"
            )


def from_nvlabs_mapping(args: GDN2ModelArgs) -> dict[str, Part]:
    """{name here: Part of a checkpoint of ``layout(args)``}."""
    fla, mapping = from_fla_mapping(args), {}
    for name in tensors_of(args):
        if name in _OUTSIDE:
            mapping[name] = Part(_OUTSIDE[name])
            continue
        _, layer, rest = name.split(".", 2)
        block = _their_block(name)
        if rest in _BLOCK:
            mapping[name] = Part(f"{block}.{_BLOCK[rest]}")
        elif args.mixer(int(layer)) == "gdn2":
            mapping[name] = Part(f"{block}.{fla[name].name.split('.', 3)[3]}", fla[name].of)
        elif rest in _QKV:
            mapping[name] = Part(f"{block}.attn.attn.weight", _split(args, _QKV.index(rest)))
        else:
            mapping[name] = Part(f"{block}.attn.proj.weight")
    return mapping


def _per_layer(args: GDN2ModelArgs) -> int | None:
    """gdn2_per_layer: layer i is GDN-2 where it divides i, and none is where it is 0. None: there is no such number."""
    kinds = [args.mixer(layer) == "gdn2" for layer in range(args.n_layers)]
    for every in range(args.n_layers + 1):
        if kinds == [every > 0 and layer % every == 0 for layer in range(args.n_layers)]:
            return every
    return None


def _check_expressible(args: GDN2ModelArgs) -> None:
    check_layer(args, _FIXED, "the authors'")
    if _per_layer(args) is None or len(args.mixers() - {"gdn2"}) > 1:
        raise ConvertError(
            f"layer_pattern is {[*args.layer_pattern]}; in the authors' layout every N-th layer from the first is "
            "'gdn2', and the others are all 'swa' or all 'attention'"
        )


def hparams_of(args: GDN2ModelArgs) -> Mapping[str, Any]:
    """What a model is, in the words of the authors' configurations; ``nvlabs_model.args_of`` reads them back."""
    return {
        "vocab_size": args.vocab_size, "padded_vocab_size": args.vocab_size, "n_layer": args.n_layers,
        "n_embd": args.hidden_size, "n_head": args.attn_heads, "n_query_groups": args.attn_kv_heads or args.attn_heads,
        "intermediate_size": args.mlp_size, "gdn2_per_layer": _per_layer(args),
        "local_window": None if "attention" in args.mixers() else args.window,
        "norm_eps": args.norm_eps, "rope_base": args.rope_theta, "rotary_percentage": 1.0,
    }  # fmt: skip
