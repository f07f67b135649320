"""The names of flash-linear-attention: its GatedDeltaNet2 layer inside a decoder named as that library's decoders are.

As of its 0.6.0. It has the layer, not yet a decoder around it: names of the rest are those of its other decoders (KDA,
Gated DeltaNet), which agree. Its gates are per channel, its output gate is a sigmoid, the projections to decay and
output gate have the rank of a head's value size. ``lower_bound`` and ``safe_gate`` are fields of its KDA's config and
arguments of its GDN-2 operator: with a bound the decay is bounded, and A_log may be absent, which stands for zeros;
safe_gate chooses kernels for bounds from -5 on.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gdn2_titan.models import GDN2ModelArgs
from gdn2_titan.models.args import SOFTMAX
from gdn2_titan.models.checks import value_head_dim

from .checkpoint_info import args_from_fields
from .errors import ConvertError
from .mapping import Part, replace_prefix, tensors_of

__all__ = ["args_from_fla", "check_layer", "config_for_fla", "from_fla_mapping", "shortest_period", "to_fla_mapping"]

_OUTSIDE = {"tok_embeddings.": "model.embeddings.", "norm.": "model.norm.", "lm_head.": "lm_head."}
_BLOCK = {"mixer_norm.": "attn_norm.", "mixer.": "attn."}
_MIXER = {
    "decay_low_proj.": "f_proj.0.", "decay_proj.": "f_proj.1.", "erase_proj.": "b_proj.", "write_proj.": "w_proj.",
    "gate_low_proj.": "g_proj.0.", "gate_proj.": "g_proj.1.", "decay.": "",
}  # fmt: skip
# Fields of that library's configs that change the computation, and the one value with which it is the model here.
_FIXED = {
    "use_short_conv": True, "conv_bias": False, "tie_word_embeddings": False, "hidden_act": "swish",
    "attnres_block_size": None,
}  # fmt: skip
_OF_ITS_LAYER = {
    "erase_gate": "channel", "write_gate": "channel", "tied_gates": False, "decay": "channel",
    "output_gate": "sigmoid", "content_gate": False,
}  # fmt: skip
FULL = (None, "full")  # ranks
_SAFE = -5.0  # the lowest bound that safe_gate's kernels take
_SAME = (
    "vocab_size", "hidden_size", "norm_eps", "num_heads", "head_dim", "num_v_heads", "expand_v", "conv_size",
    "allow_neg_eigval",
)  # fmt: skip


def _name(name: str, args: GDN2ModelArgs) -> str:
    if not name.startswith("layers."):
        return replace_prefix(name, _OUTSIDE)
    _, layer, rest = name.split(".", 2)
    rest = replace_prefix(rest, _BLOCK) or rest
    if rest.startswith("attn."):
        # A scalar decay, and what has full rank, is one factor.
        decay, gate = args.decay == "scalar" or args.decay_rank in FULL, args.gate_rank in FULL
        mixer = _MIXER | ({"decay_proj.": "f_proj."} if decay else {}) | ({"gate_proj.": "g_proj."} if gate else {})
        inner = rest.removeprefix("attn.")
        rest = "attn." + (replace_prefix(inner, mixer) or inner)
    return f"model.layers.{layer}.{rest}"


def _shape(name: str, shape: torch.Size) -> tuple[int, ...]:
    """That library's convolutions are nn.Conv1d's [channels, 1, width], its dt_bias is flat."""
    if "_conv1d." in name:
        return (shape[0], 1, shape[1])
    return (math.prod(shape),) if name.endswith(".dt_bias") else tuple(shape)


def _reshaped(theirs: tuple[int, ...], shape: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    def of(tensor):
        if tuple(tensor.shape) != theirs:
            raise RuntimeError(f"it must be {[*theirs]}")
        return tensor.reshape(shape)

    return of


def from_fla_mapping(args: GDN2ModelArgs, theirs: Collection[str] | None = None) -> dict[str, Part]:
    """{name here: Part of a flash-linear-attention checkpoint}. theirs: the names in it, if known; a bounded decay's
    A_log that is not among them is zeros."""
    tensors = tensors_of(args)
    mapping = {n: Part(_name(n, args), _reshaped(_shape(n, t.shape), tuple(t.shape))) for n, t in tensors.items()}
    if args.lower_bound is not None and theirs is not None:
        for name, part in mapping.items():
            if name.endswith(".A_log") and part.name not in theirs:
                beside = mapping[name.removesuffix("A_log") + "dt_bias"].name
                mapping[name] = Part(beside, lambda dt_bias: dt_bias.new_zeros(args.num_heads, dtype=torch.float32))
    return mapping


def to_fla_mapping(args: GDN2ModelArgs) -> dict[str, Part]:
    """{name there: Part of a checkpoint here}."""
    tensors = tensors_of(args)
    return {_name(n, args): Part(n, _reshaped(tuple(t.shape), _shape(n, t.shape))) for n, t in tensors.items()}


def _softmax_layers(config: Mapping[str, Any], path: Path) -> dict[int, dict[str, Any]]:
    """{layer: what its softmax attention is}, from the one description or the list of them that the config has."""
    specs = config.get("attn") or []
    found = {}
    for spec in [specs] if isinstance(specs, dict) else specs:
        if spec.get("qkv_bias"):
            raise ConvertError(f"{path} has attn.qkv_bias {spec['qkv_bias']!r}; it must be false")
        described = {
            "attn_heads": spec["num_heads"], "attn_kv_heads": spec.get("num_kv_heads"),
            "rope_theta": spec.get("rope_theta", 10000.0), "window": spec.get("window_size"),
        }  # fmt: skip
        found |= {layer: described for layer in spec["layers"]}
    return found


def shortest_period(pattern: Sequence[str]) -> tuple[str, ...]:
    """The shortest beginning of a pattern that gives all of it when repeated and cut off."""
    for length in range(1, len(pattern) + 1):
        if all(mixer == pattern[i % length] for i, mixer in enumerate(pattern)):
            return tuple(pattern[:length])


def args_from_fla(config: Mapping[str, Any], path: Path) -> GDN2ModelArgs:
    """GDN2ModelArgs of the dict of a config.json at ``path``.

    Raises:
        ConvertError: a field is missing, or has a value with which it is not a model of ours.
    """
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ConvertError(f"{path} has {name} {config[name]!r}; it must be {value!r}")
    missing = [name for name in (*_SAME, "num_hidden_layers") if name not in config and name != "num_v_heads"]
    if missing:
        raise ConvertError(f"{path} has no field {missing[0]!r}")
    size = config.get("intermediate_size")
    if size is None:  # that library's rule: two thirds of the ratio, up to a multiple of 256
        size = 256 * math.ceil(int(config["hidden_size"] * (config.get("hidden_ratio") or 4) * 2 / 3) / 256)
    softmax = _softmax_layers(config, path)
    windows = {spec["window"] for spec in softmax.values()} - {None}
    described = [{k: v for k, v in spec.items() if k != "window"} for spec in softmax.values()]
    if len(windows) > 1 or any(spec != described[0] for spec in described):
        raise ConvertError(f"{path} has softmax layers that differ in more than having a window; they must not")
    pattern = [
        "gdn2" if i not in softmax else "attention" if softmax[i]["window"] is None else "swa"
        for i in range(config["num_hidden_layers"])
    ]
    if config.get("safe_gate") and config.get("lower_bound") is None:
        raise ConvertError(f"{path} has safe_gate {config['safe_gate']!r} and no lower_bound; it must have both")
    fields = {name: config.get(name) for name in (*_SAME, "lower_bound")} | {
        "n_layers": config["num_hidden_layers"], "mlp_size": size, "layer_pattern": shortest_period(pattern),
        "output_gate": "sigmoid", **(described[0] if described else {}),
    }  # fmt: skip
    if windows:
        fields["window"] = windows.pop()
    return args_from_fields(fields, path)


def check_layer(args: GDN2ModelArgs, fixed: Mapping[str, Any], whose: str) -> None:
    """Raise ConvertError unless the layers are what that of ``whose`` is: in ``fixed`` fields, with ranks of a head."""
    if others := args.mixers() - {"gdn2", *SOFTMAX}:
        raise ConvertError(f"layer_pattern has {', '.join(map(repr, sorted(others)))}; {whose} model has no such layer")
    for name, value in fixed.items():
        if getattr(args, name) != value:
            raise ConvertError(f"{name} is {getattr(args, name)!r}; {whose} layer has {value!r}")
    head = value_head_dim(args.head_dim, args.expand_v)
    for name in ("decay_rank", "gate_rank"):
        if (rank := getattr(args, name)) not in ("head", head):
            raise ConvertError(f"{name} is {rank!r}; {whose} layer has {head}, a head's value size")


def config_for_fla(args: GDN2ModelArgs) -> dict[str, Any]:
    """The dict of a config.json for that library; without "model_type", as it has no decoder of this kind yet.

    Raises:
        ConvertError: the model has what that library's layer does not.
    """
    check_layer(args, _OF_ITS_LAYER, "flash-linear-attention's")
    bound = args.lower_bound
    bounded = {} if bound is None else {"lower_bound": bound, "safe_gate": bound >= _SAFE}
    layers = {}
    for layer in range(args.n_layers):
        layers.setdefault(args.mixer(layer), []).append(layer)
    specs = [
        {
            "layers": layers[kind], "num_heads": args.attn_heads, "num_kv_heads": args.attn_kv_heads, "qkv_bias": False,
            "window_size": args.window if kind == "swa" else None, "rope_theta": args.rope_theta,
        }
        for kind in ("swa", "attention")
        if kind in layers
    ]  # fmt: skip
    return {
        **{name: getattr(args, name) for name in _SAME},
        "num_hidden_layers": args.n_layers, "intermediate_size": args.mlp_size,
        "attn": None if not specs else specs[0] if len(specs) == 1 else specs,
        "use_short_conv": True, "hidden_act": "swish", "tie_word_embeddings": False, **bounded,
    }  # fmt: skip
