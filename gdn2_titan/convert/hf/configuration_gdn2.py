"""The config of a transformers model: every field of GDN2ModelArgs by its own name, and the tokenizer's special ids."""

import dataclasses
import difflib
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from gdn2_titan.models.args import MIXERS, GDN2ModelArgs

from .cache_gdn2 import CACHE_NAMES

__all__ = ["GDN2Config"]

# What tools that know no GDN-2 ask a config for, and the field that it is.
FIELD_OF = {
    "num_hidden_layers": "n_layers", "intermediate_size": "mlp_size", "num_attention_heads": "attn_heads",
    "num_key_value_heads": "attn_kv_heads", "sliding_window": "window", "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
}  # fmt: skip
# What follows from the fields. It may be given as it is.
DERIVED = ("hidden_act", "layer_types", "rope_parameters")
LAYER_TYPES = {
    "gdn2": "linear_attention", "mamba2": "linear_attention", "mamba3": "linear_attention",
    "swa": "sliding_attention", "attention": "full_attention",
}  # fmt: skip
# Names at least this much alike (difflib's ratio) are taken for one name and a slip of the pen,
ALIKE = 0.75
# unless they are how a model is to be loaded.
LOADING = ("tp_size",)


class GDN2Config(PretrainedConfig):
    """Takes the fields of ``GDN2ModelArgs``, with its defaults, and what every transformers config takes.

    Fields may be given, read and set by the names that transformers' other models have for them (FIELD_OF here).
    hidden_act, layer_types and rope_parameters follow from the fields. Unknown names are kept, as by every config.

    Raises:
        ValueError: naming the field that no model can be built from, its value and what is allowed; a field is given
            two values by two names; an unknown name looks like a field's.
    """

    model_type = "gdn2"
    keys_to_ignore_at_inference = list(CACHE_NAMES)
    # num_key_value_heads is a property: it is a number also where the field is None.
    attribute_map = {name: field for name, field in FIELD_OF.items() if name != "num_key_value_heads"}

    def __init__(
        self, use_cache: bool = True, bos_token_id: int | None = None, eos_token_id: int | None = None,
        pad_token_id: int | None = None, tie_word_embeddings: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.tie_word_embeddings = tie_word_embeddings
        if "rope_scaling" in kwargs:  # its name in older files
            kwargs.setdefault("rope_parameters", kwargs.pop("rope_scaling"))
        derived = {name: value for name in DERIVED if (value := kwargs.pop(name, None)) is not None}
        fields, others = _fields(kwargs)
        for name in others:
            _refuse_slip(name)
        for field in dataclasses.fields(GDN2ModelArgs):
            value = fields.get(field.name, field.default)
            setattr(self, field.name, list(value) if isinstance(value, tuple) else value)
        self.model_args()
        for name, value in derived.items():
            setattr(self, name, value)
        if self.rope_theta != fields.get("rope_theta", self.rope_theta):
            raise ValueError(
                f"rope_theta is {fields['rope_theta']!r} and in rope_parameters {self.rope_theta!r}; one of them must "
                "be left out"
            )
        self.model_args()  # once more: rope_parameters may have set another rope_theta
        super().__init__(**others)
        # After it: some versions of it set these to their own defaults.
        self.use_cache = use_cache
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.tie_word_embeddings = tie_word_embeddings

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As PretrainedConfig's: what is in ``kwargs`` goes before what is in the file. Refuses what the class does."""
        _, others = _fields(kwargs)
        if not kwargs.get("return_unused_kwargs"):  # else the caller looks at what is left
            for name in others:
                _refuse_slip(name)
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        config.model_args()
        return made

    def model_args(self) -> GDN2ModelArgs:
        """The GDN2ModelArgs of the model.

        Raises:
            ValueError: as the config's; an attribute may have been set since it was made.
        """
        if self.tie_word_embeddings:
            raise ValueError(
                f"tie_word_embeddings is {self.tie_word_embeddings!r}; it must be false, the head has its own"
            )
        if not isinstance(self.layer_pattern, (list, tuple)):
            allowed = ", ".join(MIXERS)
            raise ValueError(f"layer_pattern is {self.layer_pattern!r}; it must be a non-empty list of: {allowed}")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(GDN2ModelArgs)}
        args = GDN2ModelArgs(**fields | {"layer_pattern": tuple(self.layer_pattern)})
        args.validate()
        return args

    @property
    def num_key_value_heads(self) -> int:
        return self.attn_heads if self.attn_kv_heads is None else self.attn_kv_heads

    @num_key_value_heads.setter
    def num_key_value_heads(self, value: int | None) -> None:
        self.attn_kv_heads = value

    @property
    def hidden_act(self) -> str:
        return "silu"

    @hidden_act.setter
    def hidden_act(self, value: str) -> None:
        if value not in ("silu", "swish"):
            raise ValueError(f"hidden_act is {value!r}; it must be 'silu'")

    @property
    def layer_types(self) -> list[str]:
        pattern = self.layer_pattern
        return [LAYER_TYPES[pattern[layer % len(pattern)]] for layer in range(self.n_layers)]

    @layer_types.setter
    def layer_types(self, value: Any) -> None:
        if not isinstance(value, (list, tuple)) or list(value) != self.layer_types:
            raise ValueError(
                f"layer_types is {value!r}; it follows from layer_pattern = {self.layer_pattern!r} and must be left out"
            )

    @property
    def rope_parameters(self) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": self.rope_theta}

    @rope_parameters.setter
    def rope_parameters(self, value: Any) -> None:
        known = {"rope_type": "default", "type": "default", "rope_theta": self.rope_theta}
        given = {} if value is None else value
        if not isinstance(given, dict) or any(given[k] != known.get(k) for k in given if k != "rope_theta"):
            raise ValueError(f"rope_parameters is {value!r}; it must have rope_type 'default' and rope_theta alone")
        self.rope_theta = given.get("rope_theta", self.rope_theta)


def _fields(given):
    """({field: value} of what is given by the field's own or by its other name, what is given else)."""
    names = {field.name for field in dataclasses.fields(GDN2ModelArgs)}
    fields, others = {name: value for name, value in given.items() if name in names}, {}
    for name, value in given.items():
        if name in names:
            continue
        field = FIELD_OF.get(name)
        if field is None:
            others[name] = value
        elif fields.get(field) is None or fields[field] == value:
            fields[field] = value
        elif value is not None:
            raise ValueError(
                f"{field} is {fields[field]!r} and {name} is {value!r}; they are names of one field, so one of them "
                "must be left out"
            )
    return fields, others


def _refuse_slip(name):
    """Raises ValueError where ``name`` is no field, but looks like one. PretrainedConfig would keep it or leave it out,
    and the model would be another than the one that was meant."""
    known = [field.name for field in dataclasses.fields(GDN2ModelArgs)] + [*FIELD_OF, *DERIVED]
    if name in known or name in LOADING:
        return
    alike = difflib.get_close_matches(name, known, 1, ALIKE)
    if alike and not hasattr(PretrainedConfig(), name) and not hasattr(GenerationConfig(), name):
        raise ValueError(f"{name} is no field of GDN2Config; it must be left out, or {alike[0]} is meant")
