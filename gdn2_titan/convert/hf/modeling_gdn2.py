"""GDN2Model as a transformers model: the same modules under transformers' names, with its loss and its ``generate``."""

import contextlib
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from gdn2_titan.models.args import SOFTMAX, GDN2ModelArgs
from gdn2_titan.models.attention import rotary_angles
from gdn2_titan.models.batch_invariant import linear_of
from gdn2_titan.models.decay import DECAYS
from gdn2_titan.models.decoder import Block
from gdn2_titan.models.init import linear_
from gdn2_titan.models.layer import GatedDeltaNet2
from gdn2_titan.models.old_names import OLD_NAMES
from gdn2_titan.ops.elementwise import BATCH_INVARIANT

from .cache_gdn2 import CACHE, CACHE_NAMES, REACH, GDN2Cache, name_and_cache
from .call_gdn2 import Call, cut, refuse_unrecorded
from .configuration_gdn2 import GDN2Config
from .packing_gdn2 import PACKING
from .piece_gdn2 import Piece
from .spared_gdn2 import spare_from_decay

__all__ = ["GDN2Decoder", "GDN2DecoderLayer", "GDN2ForCausalLM", "GDN2PreTrainedModel"]

# For folders that name parameters as this package once did. transformers' own table would do this by the kind of the
# model, also for the code that lies beside an old folder's weights and wants the old names.
KEY_MAPPING = {re.escape(f"mixer.{old}"): f"mixer.{new}" for old, new in OLD_NAMES.items()}
# Modules of a layer.
READ_NOT_CALLED = ("decay", "q_conv1d", "k_conv1d", "v_conv1d", "x_conv1d", "bc_conv1d", "bc_norm", "heads")
# What transformers' loss takes beside logits and labels.
OF_THE_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")


class BlockStart:
    """Fills the parameters of a block's parts, any of them alone, as ``Block.init_weights`` fills the whole block.

    What a projection starts from depends on where it stands, and only the block knows that. So a block of the same
    shape, without memory of its own, is filled with the part's parameters in their places: random numbers are drawn for
    these and for nothing else.
    """

    def __init__(self, args: GDN2ModelArgs, layer: int) -> None:
        self.args, self.layer = args, layer
        self._shape = None

    def fill(self, name: str, part: nn.Module) -> None:
        """Fill those parameters of ``part``, the submodule ``name`` of the block, that no file gave a value."""
        if isinstance(part, GatedDeltaNet2):
            part.statistics.zero_()  # no file has them, and loading leaves them arbitrary
        # What a quantizer packs into whole numbers it made of values from a file.
        missing = {
            key: parameter
            for key, parameter in part.named_parameters(recurse=False)
            if parameter.is_floating_point() and not getattr(parameter, "_is_hf_initialized", False)
        }
        if not missing:
            return
        if self._shape is None:
            with torch.device("meta"):
                self._shape = Block(self.args, self.layer)
        # Not by setattr: accelerate changes what that does while it builds a model without memory.
        place = self._shape.get_submodule(name)._parameters
        empty = {key: place[key] for key in missing}
        place.update(missing)
        self._shape.init_weights()
        place.update(empty)


class GDN2DecoderLayer(GradientCheckpointingLayer, Block):
    """Block, which transformers can checkpoint, and accelerate can keep on another device or on disk."""

    def __init__(self, args: GDN2ModelArgs, layer: int) -> None:
        super().__init__(args, layer)
        start = BlockStart(args, layer)
        for name, part in self.named_modules():
            part.start_in_block = start, name  # for _init_weights, which is given a part and no more
        spare_from_decay(self.mixer)

    def forward(self, *args: Any, only_state: bool = False, **kwargs: Any) -> Any:
        """Block's, or with ``only_state`` the mixer's ``state_after``."""
        # accelerate brings a module's parameters when the module is called; these are read and never called.
        read = [getattr(self.mixer, name, None) for name in READ_NOT_CALLED]
        hooks = [(part._hf_hook, part) for part in read if hasattr(part, "_hf_hook")]
        with contextlib.ExitStack() as after:
            for hook, part in hooks:
                hook.pre_forward(part)
                after.callback(hook.post_forward, part, None)
            return self.mixer.state_after(*args, **kwargs) if only_state else super().forward(*args, **kwargs)


class GDN2PreTrainedModel(PreTrainedModel):
    """Loads parameters by their old names and today's, saves today's."""

    config_class = GDN2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GDN2DecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _keep_in_fp32_modules_strict = DECAYS
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        start = getattr(module, "start_in_block", None)
        if start is None:
            if self.config.init != "release" or module is not getattr(self, "lm_head", None):
                super()._init_weights(module)
            elif not getattr(module.weight, "_is_hf_initialized", False):
                linear_(module.weight, None)
            return
        block, name = start
        block.fill(name, module)

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, key_mapping={**(key_mapping or {}), **KEY_MAPPING}, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with what was missing
        if model.config.backend == BATCH_INVARIANT and getattr(model, "hf_quantizer", None) is not None:
            raise ValueError(f"backend is {BATCH_INVARIANT!r}; with quantization_config it must be another one")
        # transformers renames back when it saves a model.
        used = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [each for each in used if each.source_patterns[0] not in KEY_MAPPING]
        return loaded


def _check_other_words(words: dict[str, Any], seen: int, length: int) -> None:
    """Refuse what no layer heeds, unless it says what is so anyway. None says nothing."""
    for name, value in words.items():
        if name == "output_attentions":
            if value:
                raise ValueError("output_attentions is True; it must be False, these layers keep no attention weights")
        elif name == "cache_position":
            expected = list(range(seen, seen + length))
            if value is not None and torch.as_tensor(value).tolist() != expected:
                raise ValueError(f"cache_position is {value}; it must be left out, or count from {seen}")
        elif name == "token_type_ids":
            if value is not None and bool(value.any()):
                raise ValueError("token_type_ids has other numbers than 0; this model knows one type of token")
        elif value is not None:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")


class GDN2Decoder(GDN2PreTrainedModel):
    """Token ids [B, T] -> hidden states [B, T, D] after the last norm."""

    def __init__(self, config: GDN2Config) -> None:
        super().__init__(config)
        self.args = args = config.model_args()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = nn.ModuleList([GDN2DecoderLayer(args, layer) for layer in range(args.n_layers)])
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        past_key_values: GDN2Cache | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        position_ids: Tensor | None = None, resets: Tensor | None = None, cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None, max_length_k: int | None = None, seq_idx: Tensor | None = None,
        cache: GDN2Cache | None = None, **kwargs: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """input_ids [B, T], or inputs_embeds [B, T, D], that follow the tokens that a GDN2Cache has seen.

        A cache that is given is used and updated; with ``use_cache`` and none given there is a new one in the output.
        ``cache`` and ``past_key_values`` are one argument: transformers renamed it in 5.24.
        attention_mask: [B, tokens seen + T], 0 for padding, anywhere. Padding changes nothing; the output there is that
        of the last token of text before it in the row, zeros where there is none.

        Rows that hold several documents (packing), of which none sees another, are told by one or more of these, which
        must agree. At any time: resets, bool [B, T], True where a document begins; position_ids, int [B, T], 0 where a
        document begins, else one more than before. In a first call: seq_idx, int [B, T], the number of the document;
        with B = 1, cu_seqlens or cu_seq_lens_q and cu_seq_lens_k, int [documents + 1], their bounds from 0 to T (with
        them max_length_q and max_length_k, tokens of the longest). docs/padding.md of the package has a table of what
        may be said, when, and whether it is served.

        Raises:
            TypeError: an unknown keyword, a wrong type or dtype, or a cache that is no GDN2Cache.
            ValueError: both or neither of input_ids and inputs_embeds, or what the table says is refused.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"{given} of input_ids and inputs_embeds given; exactly one must be")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(use_cache, len(h), *name_and_cache(past_key_values, cache))
        seen = 0 if cache is None else cache.seen
        _check_other_words(kwargs | {"output_attentions": output_attentions}, seen, h.shape[1])
        words = dict(
            position_ids=position_ids, resets=resets, cu_seqlens=cu_seqlens, cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k, max_length_q=max_length_q, max_length_k=max_length_k, seq_idx=seq_idx,
        )  # fmt: skip
        piece = Piece(attention_mask, words, cache, *h.shape[:2], h.device)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        call = None
        if cache is not None and cache.calls is not None:
            refuse_unrecorded(words)
            if h.shape[1] > REACH:
                return self._in_two(h, attention_mask, words, cache, output_hidden_states)
            call = Call(cache, attention_mask, words, piece.text, h.shape[1])
        in_place = call is None and not torch.is_grad_enabled()
        states = [None] * len(self.layers) if cache is None else list(cache.states)
        angles, masks = self._angles_and_masks(piece, states)
        h, hidden_states = piece.shortened(h), ()
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                hidden_states += (piece.whole(h),)
            if piece.is_empty:
                continue
            inputs = h, piece.resets, angles, masks.get(layer.kind)
            if cache is None:
                h = layer(*inputs, rows=piece.rows)
            else:
                h, states[index] = layer(
                    *inputs, rows=piece.rows, state=states[index], return_state=True, in_place=in_place,
                    record=call and call.record(),
                )  # fmt: skip
        h = piece.whole(self.norm(h), piece.last)
        if cache is not None:
            piece.remember(cache, states, h)
            if call is not None:
                cache.add(call.end(self.layers, h))
        hidden_states = (*hidden_states, h) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=h, hidden_states=hidden_states, **{CACHE: cache})

    def _in_two(
        self, h: Tensor, mask: Tensor | None, words: dict[str, Any], cache: GDN2Cache, output_hidden_states: bool
    ) -> BaseModelOutputWithPast:
        """A call of h [B, T, D] of which the last REACH tokens can be taken back."""
        outputs, length = [], h.shape[1]
        for start, end in ((0, length - REACH), (length - REACH, length)):
            cache.calls = [] if start else None
            of_these = None if mask is None else mask[:, : mask.shape[1] - length + end]
            outputs.append(
                self(
                    inputs_embeds=h[:, start:end], attention_mask=of_these, cache=cache,
                    output_hidden_states=output_hidden_states, return_dict=True, **cut(words, start, end),
                )
            )  # fmt: skip
        hidden_states = [
            torch.cat(parts, 1) for parts in zip(*(each.hidden_states or () for each in outputs), strict=True)
        ]
        return BaseModelOutputWithPast(
            last_hidden_state=torch.cat([each.last_hidden_state for each in outputs], 1),
            hidden_states=tuple(hidden_states) or None, **{CACHE: cache},
        )  # fmt: skip

    def _angles_and_masks(self, piece: Piece, states: list[Any]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the softmax layers take, computed once for all of them: angles, and {kind: mask}."""
        kept = {
            layer.kind: 0 if state is None else state.keys.shape[1]
            for layer, state in zip(self.layers, states, strict=True)
            if layer.kind in SOFTMAX
        }
        if not kept or piece.is_empty:
            return None, {}
        args = self.args
        masks = {kind: piece.mask(args.window if kind == "swa" else None, keys) for kind, keys in kept.items()}
        return rotary_angles(piece.positions(), args.hidden_size // args.attn_heads, args.rope_theta), masks

    def _cache(self, use_cache: bool | None, batch: int, name: str, given: Any) -> GDN2Cache | None:
        if given is not None:
            if not isinstance(given, GDN2Cache):
                raise TypeError(f"{name} is a {type(given).__name__}; it must be a GDN2Cache")
            if len(given) != self.args.n_layers:
                raise ValueError(f"{name} has {len(given)} layers; it must have {self.args.n_layers}")
            if given.seen and given.batch_size != batch:
                raise ValueError(f"{name} has {given.batch_size} rows; it must have {batch} as the input has")
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.training and self.gradient_checkpointing:
            use_cache = False  # what is computed twice must not be kept twice
        return GDN2Cache(self.args.n_layers) if use_cache else None


class GDN2ForCausalLM(GDN2PreTrainedModel, GenerationMixin):
    """Token ids [B, T] -> logits [B, T, vocab_size], and the loss where there are labels."""

    def __init__(self, config: GDN2Config) -> None:
        super().__init__(config)
        self.model = GDN2Decoder(config)
        self.lm_head = linear_of(config.backend)(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        past_key_values: GDN2Cache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, output_hidden_states: bool | None = None, logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None, resets: Tensor | None = None, cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None, cache: GDN2Cache | None = None, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """As GDN2Decoder's, which takes ``kwargs``. logits_to_keep: of how many last tokens, 0 for all, or a tensor of
        indices. labels: [B, T], shifted inside, -100 where there is no loss; so the last token of a document has the
        first of the next for its label, unless that is -100 (transformers' collator makes it so). The loss takes
        ``num_items_in_batch``, ``ignore_index`` and ``shift_labels``, or what one of your own has parameters for.
        """
        of_loss = {name: kwargs.pop(name) for name in self._of_the_loss(kwargs)}
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, output_hidden_states=output_hidden_states,
            position_ids=position_ids, resets=resets, cu_seqlens=cu_seqlens, seq_idx=seq_idx, cache=cache,
            return_dict=True, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or of_loss.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
        )

    def _of_the_loss(self, names):
        """Which of these keywords are the loss function's."""
        mine = [name for name in names if name in OF_THE_LOSS]
        if len(mine) < len(names) and self.loss_function is not ForCausalLMLoss:
            parameters = inspect.signature(self.loss_function).parameters
            mine += [name for name in names if name in parameters and name not in mine]
        return mine

    def _prepare_position_ids_for_generation(self, *args, **kwargs):
        """None: they follow from the mask, and transformers' own go on from 0 after padding on the right."""

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
        for name in PACKING:
            if model_kwargs.get(name) is not None:
                raise ValueError(f"{name} is given to generate; it must be left out, position_ids tell of documents")
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit is {generation_config.assistant_early_exit!r}; it must be left out, this model "
                "has no exit before its last layer"
            )
        _, cache = name_and_cache(*(model_kwargs.pop(name, None) for name in CACHE_NAMES))
        if cache is not None:
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            cache = GDN2Cache(self.config.n_layers)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        if cache is not None:
            model_kwargs[CACHE] = cache

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """transformers', which lets a cache record its past, and then leaves it so."""
        cache = kwargs.get(CACHE)
        recorded = cache is None or cache.calls is not None
        try:
            return super()._assisted_decoding(*args, **kwargs)
        finally:
            if not recorded:
                cache.calls = None

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError: ``generate_batch`` keeps pages of keys and values, which this model's states are not."""
        raise ValueError("generate_batch keeps keys and values in pages; this model has states, so it must be generate")

    def prepare_inputs_for_generation(self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        # Embeddings by name: transformers reads in this signature whether generation may start from them.
        inputs = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        # PEFT 0.21 looks for the older name under any transformers, and takes every step for a first one without it.
        return inputs | (dict.fromkeys(CACHE_NAMES, inputs[CACHE]) if CACHE in inputs else {})
