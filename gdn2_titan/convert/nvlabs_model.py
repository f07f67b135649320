"""Which model a checkpoint of the authors' layout holds: from its tensors' shapes, from ``hparams`` beside them, and
from the flavors of these shapes."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdn2_titan.models import GDN2ModelArgs, flavors

from .checkpoint_info import args_from_fields
from .errors import ConvertError
from .fla import shortest_period
from .mapping import Source

__all__ = ["args_of"]

_LAYER = re.compile(r"transformer\.h\.(\d+)\.")
# Words of the authors' configurations: a field here, of softmax layers.
_SOFTMAX = {"n_head": "attn_heads", "n_query_groups": "attn_kv_heads", "rope_base": "rope_theta"}
# Of softmax layers, and of all: the one value with which it is the model here.
_FIXED_OF_SOFTMAX = {"nope": False, "rotary_percentage": 1.0, "condense_ratio": 1}
_FIXED = {"parallel_residual": False}
_CONFIG_OR_FLAVOR = "name its model with --config or --flavor"


def _shape(source: Source, names: list[str], dims: int) -> tuple[int, ...]:
    """The shape that most of these tensors have, one of each layer: a wrong one among them is then named as wrong."""
    shapes = Counter(tuple(source.tensors[name].shape) for name in names if name in source.tensors)
    if not shapes:
        raise ConvertError(f"{source.path} has no tensor {names[0]!r}; a checkpoint of the authors' layout has it")
    shape = shapes.most_common(1)[0][0]
    if len(shape) != dims or 0 in shape:
        raise ConvertError(f"{source.path} has tensor {names[0]!r} of shape {[*shape]}; it must have {dims} dimensions")
    return shape


def _kinds(source: Source) -> list[str]:
    """Of each layer: "gdn2" or "softmax"."""
    softmax = {}
    for name in source.tensors:
        if found := _LAYER.match(name):
            layer, rest = int(found.group(1)), name[found.end() :]
            softmax[layer] = softmax.get(layer, False) or rest in ("attn.attn.weight", "attn.proj.weight")
    if not softmax:
        raise ConvertError(f"{source.path} has no tensor of a layer, 'transformer.h.0....'")
    for layer in range(max(softmax)):
        if layer not in softmax:
            raise ConvertError(f"{source.path} has no tensor of layer {layer}, and has layer {max(softmax)}")
    return ["softmax" if softmax[layer] else "gdn2" for layer in range(len(softmax))]


def _read_shapes(source: Source) -> tuple[dict[str, Any], list[str], int]:
    """(fields of GDN2ModelArgs, kinds of the layers, width of all keys of a softmax layer or 0)."""
    kinds = _kinds(source)

    def shape(name, dims, of=("gdn2", "softmax")):
        layers = [layer for layer, kind in enumerate(kinds) if kind in of]
        return _shape(source, [f"transformer.h.{layer}.{name}" for layer in layers], dims)

    (width,) = shape("norm_1.weight", 1)
    fields = {
        "vocab_size": _shape(source, ["transformer.wte.weight"], 2)[0], "hidden_size": width, "n_layers": len(kinds),
        "mlp_size": shape("mlp.swiglu.w1.weight", 2)[0],
    }  # fmt: skip
    if "gdn2" in kinds:
        (heads,), (keys,), (value_size,) = (
            shape(f"attn.{name}", 1, ["gdn2"]) for name in ("A_log", "dt_bias", "o_norm.weight")
        )
        values = shape("attn.v_proj.weight", 2, ["gdn2"])[0]
        if keys % heads or values % value_size:
            raise ConvertError(
                f"{source.path} has attn.dt_bias of {keys} for {heads} heads, and attn.v_proj of {values} rows for "
                f"heads of {value_size}; each must be a multiple"
            )
        fields |= {
            "num_heads": heads, "head_dim": keys // heads, "expand_v": value_size / (keys // heads),
            "num_v_heads": None if values == heads * value_size else values // value_size,
            "conv_size": shape("attn.q_conv1d.weight", 3, ["gdn2"])[2],
        }  # fmt: skip
    if "softmax" not in kinds:
        return fields, kinds, 0
    rows = shape("attn.attn.weight", 2, ["softmax"])[0]
    if rows <= width or (rows - width) % 2:
        raise ConvertError(
            f"{source.path} has attn.attn of {rows} rows; it must be {width}, and as many of keys as of values"
        )
    return fields, kinds, (rows - width) // 2


def _fits(args: GDN2ModelArgs, fields: Mapping[str, Any], kinds: list[str], kv_width: int) -> bool:
    """Whether a flavor is a model of these shapes."""
    same = dataclasses.replace(args, num_v_heads=None if args.num_v_heads == args.num_heads else args.num_v_heads)
    mixers = ["gdn2" if args.mixer(layer) == "gdn2" else "softmax" for layer in range(args.n_layers)]
    width = args.hidden_size // args.attn_heads * (args.attn_kv_heads or args.attn_heads)
    return (
        all(getattr(same, name) == value for name, value in fields.items())
        and mixers == kinds
        and kv_width in (0, width)
    )


def _said(hparams: Mapping[str, Any], softmax: bool) -> dict[str, Any]:
    """The fields of GDN2ModelArgs that hparams say; window None means that softmax layers see everything."""
    fields = {}
    if hparams.get("norm_eps") is not None:
        fields["norm_eps"] = hparams["norm_eps"]
    if softmax:
        fields |= {ours: hparams[name] for name, ours in _SOFTMAX.items() if hparams.get(name) is not None}
        if "local_window" in hparams:
            window = hparams["local_window"]
            fields["window"] = None if window is None or (isinstance(window, int) and window < 1) else window
    return fields


def _check_hparams(source: Source, hparams: Mapping[str, Any], fields: Mapping[str, Any], kinds: list[str]) -> None:
    """Refuse what hparams say that the tensors contradict, or that no model here does."""
    of_shapes = {
        "n_layer": fields["n_layers"], "n_embd": fields["hidden_size"], "intermediate_size": fields["mlp_size"],
        "padded_vocab_size": fields["vocab_size"],
    }  # fmt: skip
    for name, found in of_shapes.items():
        if hparams.get(name) is not None and hparams[name] != found:
            raise ConvertError(f"{source.path} has hparams {name} {hparams[name]!r}; its tensors make it {found}")
    vocabulary = hparams.get("vocab_size")
    if isinstance(vocabulary, int) and vocabulary > fields["vocab_size"]:
        raise ConvertError(
            f"{source.path} has hparams vocab_size {vocabulary}; its embedding has {fields['vocab_size']} rows"
        )
    every = hparams.get("gdn2_per_layer")
    if isinstance(every, int) and not isinstance(every, bool):
        said = ["gdn2" if every > 0 and layer % every == 0 else "softmax" for layer in range(len(kinds))]
        if said != kinds:
            raise ConvertError(
                f"{source.path} has hparams gdn2_per_layer {every}; its tensors have GDN-2 in layers "
                f"{[layer for layer, kind in enumerate(kinds) if kind == 'gdn2']}"
            )
    for name, value in (_FIXED | (_FIXED_OF_SOFTMAX if "softmax" in kinds else {})).items():
        if hparams.get(name) is not None and hparams[name] != value:
            raise ConvertError(f"{source.path} has hparams {name} {hparams[name]!r}; it must be {value!r}")


def _with(args: GDN2ModelArgs, fields: Mapping[str, Any], kinds: list[str], path: Path) -> GDN2ModelArgs:
    """args with fields, of which a window None makes the softmax layers full, and a number makes them windowed."""
    fields = dict(fields)
    if "window" in fields:
        softmax = "attention" if fields["window"] is None else "swa"
        fields["layer_pattern"] = shortest_period([softmax if kind == "softmax" else kind for kind in kinds])
        if fields["window"] is None:
            del fields["window"]
    return args_from_fields(dataclasses.asdict(args) | fields, path)


def args_of(source: Source, hparams: Mapping[str, Any]) -> tuple[GDN2ModelArgs, str | None]:
    """(GDN2ModelArgs, name of the flavor that fits or None) of a checkpoint by the authors' names.

    Sizes are read off the shapes. What shapes do not say (norm_eps, and of softmax layers heads, window and the base of
    the positions) is what hparams say, else what the flavor of these shapes says.

    Args:
        source: with names as of ``nvlabs.layout``.
        hparams: of the file, {} where it has none. Words that are not known here are left alone.

    Raises:
        ConvertError: a tensor that tells a size is missing, hparams and shapes differ, two flavors fit, or none does
            and hparams do not say what softmax layers are.
    """
    fields, kinds, kv_width = _read_shapes(source)
    _check_hparams(source, hparams, fields, kinds)
    said = _said(hparams, "softmax" in kinds)
    fitting = {
        name: _with(args, said, kinds, source.path)
        for name, args in flavors.items()
        if _fits(args, fields, kinds, kv_width)
    }
    models = [*fitting.values()]
    if any(args != models[0] for args in models):
        raise ConvertError(f"{source.path} fits the flavors {', '.join(fitting)}; {_CONFIG_OR_FLAVOR}")
    if models:
        return models[0], next(iter(fitting))
    if "softmax" in kinds:
        missing = [word for word, ours in (("n_head", "attn_heads"), ("local_window", "window")) if ours not in said]
        if missing:
            raise ConvertError(
                f"{source.path} fits no flavor, and has no hparams {missing[0]}, which its softmax layers need; "
                f"{_CONFIG_OR_FLAVOR}"
            )
        heads = said["attn_heads"]
        if "attn_kv_heads" not in said and isinstance(heads, int) and heads > 0:
            size = fields["hidden_size"] // heads
            if size < 1 or kv_width % size:
                raise ConvertError(
                    f"{source.path} has hparams n_head {heads}, heads of {size}; its {kv_width} rows of keys are no "
                    "multiple of that"
                )
            said["attn_kv_heads"] = kv_width // size
    if kinds.count("gdn2") == len(kinds):
        fields["layer_pattern"] = ("gdn2",)
    return _with(GDN2ModelArgs(), fields | said, kinds, source.path), None
