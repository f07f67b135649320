"""What ``generate`` carries from token to token: a state for every layer, most of them of a size that never changes."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

__all__ = ["GDN2Cache"]


class GDN2Cache(Cache):
    """The layers' states, and where in their sequences they stand.

    A "gdn2" layer has a GDN2State (the convolutions' last inputs and the memory), a "swa" layer the keys and values
    of the last window, an "attention" layer those of all tokens. With padding it also keeps which tokens were text, a
    byte per token and row.
    """

    is_compileable = is_croppable = False

    def __init__(self, n_layers: int) -> None:
        super().__init__(layers=[])
        self.states = [None] * n_layers
        self.seen = 0  # tokens so far, padding included
        self.text = None  # bool [B, seen], False for padding; None where all tokens are text
        self.places = None  # int64 [B], of the token that comes next in its document; None where it is ``seen``
        self.over = None  # bool [B], rows whose next token of text begins a document; None where it goes on
        self.last = None  # [B, D], the output at the last token of each row that is text, zeros before there is one

    def __len__(self) -> int:
        return len(self.states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # none

    get_max_cache_shape = get_max_length  # its name before transformers 5

    @property
    def is_initialized(self) -> bool:
        return self.seen > 0

    @property
    def batch_size(self) -> int:
        return self.last.shape[0] if self.seen else -1

    def crop(self, *args: Any) -> None:
        """Raises ValueError: a recurrent state cannot be taken back to an earlier token."""
        raise ValueError("a GDN2Cache cannot be cropped: a recurrent state does not hold the tokens it was made of")

    def reset(self) -> None:
        self.__init__(len(self))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor, all with a batch as first dimension, by ``change(tensor)``."""
        self.states = [state and type(state)(*map(change, state)) for state in self.states]
        for name in ("text", "places", "over", "last"):
            tensor = getattr(self, name)
            setattr(self, name, tensor if tensor is None else change(tensor))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))
