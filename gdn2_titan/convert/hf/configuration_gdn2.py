"""The config of a transformers model: every field of GDN2ModelArgs by its own name, and the tokenizer's special ids."""

import dataclasses

from transformers import PretrainedConfig

from gdn2_titan.models.args import GDN2ModelArgs

__all__ = ["GDN2Config"]


class GDN2Config(PretrainedConfig):
    """Takes the fields of ``GDN2ModelArgs``, with its defaults, and what every transformers config takes.

    Raises:
        ValueError: naming the field that no model can be built from, its value and what is allowed.
    """

    model_type = "gdn2"
    keys_to_ignore_at_inference = ["past_key_values"]
    # What tools that know no GDN-2 ask a config for.
    attribute_map = {
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_size",
        "num_attention_heads": "attn_heads",
        "num_key_value_heads": "attn_kv_heads",
    }

    def __init__(
        self,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
        **kwargs,
    ):
        if tie_word_embeddings:
            raise ValueError(f"tie_word_embeddings is {tie_word_embeddings!r}; it must be false, the head has its own")
        for field in dataclasses.fields(GDN2ModelArgs):
            alias = next((alias for alias, name in self.attribute_map.items() if name == field.name), field.name)
            value = kwargs.pop(field.name, kwargs.pop(alias, field.default))
            setattr(self, field.name, list(value) if field.name == "layer_pattern" else value)
        self.model_args().validate()
        super().__init__(**kwargs)
        # After it: some versions of it set these to their own defaults.
        self.use_cache = use_cache
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.tie_word_embeddings = False

    def model_args(self):
        """The GDN2ModelArgs of the model."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(GDN2ModelArgs)}
        return GDN2ModelArgs(**fields | {"layer_pattern": tuple(self.layer_pattern)})
