"""A decoder that reads one text piece by piece, carrying the states of its layers."""

import torch
from torch import Tensor

from .args import SOFTMAX
from .attention import rotary_angles
from .decoder import GDN2Model, State
from .masks import continued_mask

__all__ = ["Decoding"]


class Decoding:
    """``Decoding(model)(tokens)``: logits [1, vocab_size] after the ids [1, T], which follow those of earlier calls.

    Needs no more memory with every token, but for the keys and values of softmax layers. Nothing is written in place:
    ``again()`` goes on from here as often as one likes.
    """

    def __init__(self, model: GDN2Model) -> None:
        self._model, self._seen = model, 0
        self._states: list[State | None] = [None] * model.args.n_layers

    def again(self) -> "Decoding":
        """Another that stands where this one does."""
        other = Decoding(self._model)
        other._seen, other._states = self._seen, list(self._states)
        return other

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        model, args = self._model, self._model.args
        (_, T), h, device = tokens.shape, model.tok_embeddings(tokens), tokens.device
        positions = torch.arange(self._seen, self._seen + T, device=device)
        angles = rotary_angles(positions, args.hidden_size // args.attn_heads, args.rope_theta)
        for index, block in enumerate(model.layers.values()):
            mask, state = None, self._states[index]
            if block.kind in SOFTMAX:
                kept, window = 0 if state is None else state.keys.shape[1], args.window if block.kind == "swa" else None
                mask = continued_mask(T, kept, window, self._seen, None, device)
            h, self._states[index] = block(h, None, angles, mask, state=state, return_state=True)
        self._seen += T
        return model.lm_head(model.norm(h[:, -1]))
