"""GDN2Model as a transformers model: the same modules under transformers' names, with its loss and its ``generate``."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from gdn2_titan.models.attention import rotary_angles
from gdn2_titan.models.decay import DECAYS, DecayParameters
from gdn2_titan.models.decoder import Block
from gdn2_titan.models.masks import continued_mask

from .cache_gdn2 import GDN2Cache
from .configuration_gdn2 import GDN2Config
from .initial_gdn2 import BlockStart
from .old_names_gdn2 import ReadsOldNames
from .padding_gdn2 import text_begins

__all__ = ["GDN2Decoder", "GDN2DecoderLayer", "GDN2ForCausalLM", "GDN2PreTrainedModel"]


class GDN2Decays(DecayParameters, nn.LayerNorm):
    """DecayParameters that transformers' Trainer does not decay: it spares biases and norms, by a part of a name or by
    this class, and A_log has no such name."""

    extra_repr = nn.Module.extra_repr


class GDN2DecoderLayer(GradientCheckpointingLayer, Block):
    """Block, which transformers can checkpoint, and accelerate can keep on another device or on disk."""

    def __init__(self, args, layer):
        super().__init__(args, layer)
        start = BlockStart(args, layer)
        for name, part in self.named_modules():
            part.start_in_block = start, name  # for _init_weights, which is given a part and no more
        if self.kind == "gdn2":
            self.mixer.decay.__class__ = GDN2Decays

    def forward(self, *args, **kwargs):
        decay = getattr(self.mixer, "decay", None)
        hook = getattr(decay, "_hf_hook", None)
        if hook is None:
            return super().forward(*args, **kwargs)
        # accelerate brings a module's parameters when the module is called; these are read and never called.
        hook.pre_forward(decay)
        try:
            return super().forward(*args, **kwargs)
        finally:
            hook.post_forward(decay, None)


class GDN2PreTrainedModel(ReadsOldNames, PreTrainedModel):
    config_class = GDN2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GDN2DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = DECAYS
    _supports_sdpa = True
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module):
        start = getattr(module, "start_in_block", None)
        if start is None:
            super()._init_weights(module)
        else:
            block, name = start
            block.fill(name, module)


class GDN2Decoder(GDN2PreTrainedModel):
    """Token ids [B, T] -> hidden states [B, T, D] after the last norm."""

    def __init__(self, config):
        super().__init__(config)
        self.args = args = config.model_args()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = nn.ModuleList([GDN2DecoderLayer(args, layer) for layer in range(args.n_layers)])
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
    ):
        """input_ids [B, T], or inputs_embeds [B, T, D], that follow the tokens that a GDN2Cache has seen.

        attention_mask: [B, tokens seen + T], 0 for padding, on the left. A cache that is given is used and updated;
        with ``use_cache`` and none given there is a new one in the output.

        Raises:
            TypeError: the cache is no GDN2Cache.
            ValueError: both or neither of input_ids and inputs_embeds, or a mask of another shape or form.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"{given} of input_ids and inputs_embeds given; exactly one must be")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        length, seen = h.shape[1], cache.seen if cache is not None else 0
        begins = text_begins(attention_mask, length, cache)
        resets = angles = None
        masks = {}
        positions = torch.arange(seen, seen + length, device=h.device)
        if begins is not None:
            begins = begins.to(h.device)
            resets = positions == begins[:, None]
        kinds = self.args.mixers() - {"gdn2"}
        if kinds:
            # Counted from where the text begins, so that a row's angles are those it has without padding.
            places = positions if begins is None else (positions - begins[:, None]).clamp_min(0)
            angles = rotary_angles(places, self.args.hidden_size // self.args.attn_heads, self.args.rope_theta)
            windows = {kind: self.args.window if kind == "swa" else None for kind in kinds}
            masks = {kind: continued_mask(length, seen, window, begins, h.device) for kind, window in windows.items()}
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states, hidden_states = [], ()
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                hidden_states += (h,)
            if cache is None:
                h = layer(h, resets, angles, masks.get(layer.kind))
            else:
                state = cache.states[index]
                h, state = layer(h, resets, angles, masks.get(layer.kind), state=state, return_state=True)
                states.append(state)
        h = self.norm(h)
        if cache is not None:
            cache.states, cache.seen = states, seen + length
        return BaseModelOutputWithPast(
            last_hidden_state=h,
            past_key_values=cache,
            hidden_states=(*hidden_states, h) if output_hidden_states else None,
        )

    def _cache(self, given, use_cache):
        if given is not None:
            if not isinstance(given, GDN2Cache):
                raise TypeError(f"past_key_values is a {type(given).__name__}; it must be a GDN2Cache")
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.training and self.gradient_checkpointing:
            use_cache = False  # what is computed twice must not be kept twice
        return GDN2Cache(self.args.n_layers) if use_cache else None


class GDN2ForCausalLM(GDN2PreTrainedModel, GenerationMixin):
    """Token ids [B, T] -> logits [B, T, vocab_size], and the loss where there are labels."""

    def __init__(self, config):
        super().__init__(config)
        self.model = GDN2Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """As GDN2Decoder's. labels: [B, T], shifted inside, -100 where there is no loss. logits_to_keep: of how many
        last tokens, 0 for all, or a tensor of indices. kwargs go to transformers' loss."""
        if kwargs.get("position_ids") is not None:
            raise ValueError("position_ids given; positions follow from attention_mask, so it must be left out")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """What ``generate`` starts from; transformers' own caches have no place for this model's states."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; it must be left out, "
                "this model has a cache of its own"
            )
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                f"prefill_chunk_size is {generation_config.prefill_chunk_size!r}; it must be left out where "
                "inputs_embeds is given, transformers cuts ids alone in pieces"
            )
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = GDN2Cache(self.config.n_layers)

    def init_continuous_batching(self, *args, **kwargs):
        """Raises ValueError: ``generate_batch`` keeps pages of keys and values, which this model's states are not."""
        raise ValueError("generate_batch keeps keys and values in pages; this model has states, so it must be generate")

    def prepare_inputs_for_generation(self, *args, inputs_embeds=None, **kwargs):
        # Embeddings by name: transformers reads in this signature whether generation may start from them.
        inputs = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        inputs.pop("position_ids", None)  # transformers 4 makes some up for a prompt in pieces
        return inputs
