"""The decoder as TorchTitan 0.2.2 calls it."""

from gdn2_titan.models import GDN2Model

__all__ = ["TitanModel"]


class TitanModel(GDN2Model):
    """TorchTitan hands attention masks, and nothing else, to every pipeline stage, cut into microbatches like the
    tokens. The resets travel under that name: masks of softmax layers are made from them where they are needed."""

    def get_attention_masks(self, input_batch, tokenizer, extra_inputs=None):
        """bool [B, T], True where a document begins, or None; taken out of ``extra_inputs``."""
        return (extra_inputs or {}).pop("resets", None)

    def forward(self, tokens, attention_masks=None, positions=None):
        """positions: comes under context parallelism, to every stage; the model knows them from its shards."""
        return super().forward(tokens, attention_masks)
