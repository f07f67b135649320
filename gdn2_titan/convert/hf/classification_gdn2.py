"""The decoder with a small head in place of the vocabulary's: labels of texts, labels of tokens, answers in a text.

transformers has heads of this kind for any decoder. Their text ends at the last id that is not the padding's, wherever
that id stands, and embeddings are taken for texts without padding; here the attention mask says where a text ends.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import modeling_outputs
from transformers.utils import can_return_tuple

from gdn2_titan.models.batch_invariant import linear_of

from .cache_gdn2 import CACHE, GDN2Cache
from .configuration_gdn2 import GDN2Config
from .modeling_gdn2 import GDN2Decoder, GDN2PreTrainedModel

__all__ = ["GDN2ForQuestionAnswering", "GDN2ForSequenceClassification", "GDN2ForTokenClassification"]


class _DecoderWithHead(GDN2PreTrainedModel):
    accepts_loss_kwargs = False  # the loss is a mean over texts, whatever a trainer has counted

    def __init__(self, config: GDN2Config, head: str, rows: int | None = None, bias: bool = True) -> None:
        """head: the name of a Linear of so many ``rows``, None for one of each label."""
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GDN2Decoder(config)
        setattr(self, head, linear_of(config.backend)(config.hidden_size, rows or config.num_labels, bias=bias))
        self.post_init()


class GDN2ForSequenceClassification(_DecoderWithHead):
    """Token ids [B, T] -> logits [B, num_labels] at each text's last token, and the loss where there are labels."""

    def __init__(self, config: GDN2Config) -> None:
        super().__init__(config, "score", bias=False)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        past_key_values: GDN2Cache | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, use_cache: bool | None = False, **kwargs: Any,
    ) -> modeling_outputs.SequenceClassifierOutputWithPast:  # fmt: skip
        """As GDN2Decoder's, which also takes ``kwargs``. labels: [B] classes, or what ``config.problem_type`` wants.

        Raises:
            ValueError: several texts, and nothing tells where they end: neither a mask nor a padding id.
        """
        outputs = self.model(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, return_dict=True, **kwargs
        )
        hidden = outputs.last_hidden_state
        last = self._last_tokens(hidden, input_ids, attention_mask)
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return modeling_outputs.SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
        )

    def _last_tokens(self, hidden: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """int64 [B], where in ``hidden`` [B, T, D] each text ends."""
        rows, length = hidden.shape[:2]
        if attention_mask is not None:
            text = attention_mask[:, -length:] != 0  # a mask has also what a cache has seen
        elif input_ids is not None and self.config.pad_token_id is not None:
            text = input_ids != self.config.pad_token_id
        elif rows == 1:
            return torch.tensor([length - 1], device=hidden.device)
        else:
            raise ValueError(
                f"attention_mask is None in a batch of {rows}; it must say where each text ends, where no pad_token_id "
                "in the config does for input_ids"
            )
        positions = torch.arange(length, device=hidden.device)
        return (positions * text.to(hidden.device)).argmax(-1)


class GDN2ForTokenClassification(_DecoderWithHead):
    """Token ids [B, T] -> logits [B, T, num_labels], each of what is known up to its token, and the loss of labels."""

    def __init__(self, config: GDN2Config) -> None:
        super().__init__(config, "score")

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = False, **kwargs: Any,
    ) -> modeling_outputs.TokenClassifierOutput:  # fmt: skip
        """As GDN2Decoder's, which also takes ``kwargs``. labels: [B, T], -100 where there is no loss."""
        outputs = self.model(input_ids, attention_mask, None, inputs_embeds, use_cache, return_dict=True, **kwargs)
        logits = self.score(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return modeling_outputs.TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class GDN2ForQuestionAnswering(_DecoderWithHead):
    """Token ids [B, T] -> logits [B, T] of where an answer starts and of where it ends, and the loss of both."""

    def __init__(self, config: GDN2Config) -> None:
        super().__init__(config, "qa_outputs", rows=2)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, start_positions: Tensor | None = None,
        end_positions: Tensor | None = None, use_cache: bool | None = False, **kwargs: Any,
    ) -> modeling_outputs.QuestionAnsweringModelOutput:  # fmt: skip
        """As GDN2Decoder's, which also takes ``kwargs``. start_positions and end_positions: [B], or neither."""
        outputs = self.model(input_ids, attention_mask, None, inputs_embeds, use_cache, return_dict=True, **kwargs)
        start, end = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions)
        return modeling_outputs.QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, hidden_states=outputs.hidden_states
        )
