"""What ``generate`` carries from token to token: a state for every layer, most of them of a size that never changes."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

__all__ = ["CACHE", "CACHE_NAMES", "GDN2Cache", "REACH", "name_and_cache"]

# What transformers has called a cache, in calls and in outputs; and what the installed version does.
CACHE_NAMES = ("past_key_values", "cache")  # the second from 5.24 on
CACHE = next(name for name in reversed(CACHE_NAMES) if name in BaseModelOutputWithPast.__dataclass_fields__)

# Tokens that a cache can be taken back by, at most: the inputs of the states are kept for as many.
REACH = 256
TENSORS = ("text", "places", "over", "last")


class GDN2Cache(Cache):
    """The layers' states, and where in their sequences they stand.

    A "gdn2" or "mamba2" layer has the convolutions' last inputs and the memory, a "mamba3" layer the memory and what
    the next token needs of the last, a "swa" layer the keys and values of the last window, an "attention" layer those
    of all tokens. With padding it also keeps which tokens were text, a byte per token and row. A step of one token
    overwrites the states of "gdn2" layers.

    After ``activate_past_recording`` it can be taken back by ``crop``: nothing is overwritten then, and until the next
    crop it keeps the states before each call, and of calls of several tokens what the states were made of.
    """

    is_compileable, is_croppable = False, True
    is_linear = (False,)  # one number for all layers: tokens seen are counted, and ``generate`` passes over them

    def __init__(self, n_layers: int) -> None:
        super().__init__(layers=[])
        self.states = [None] * n_layers
        self.seen = 0  # tokens so far, padding included
        self.text = None  # bool [B, seen], False for padding; None where all tokens are text
        self.places = None  # int64 [B], of the token that comes next in its document; None where it is ``seen``
        self.over = None  # bool [B], rows whose next token of text begins a document; None where it goes on
        self.last = None  # [B, D], the output at the last token of each row that is text, zeros before there is one
        self.calls = None  # a call_gdn2.Call for each since the last crop; None where the past is not recorded

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

    def activate_past_recording(self) -> None:
        self.calls = [] if self.calls is None else self.calls

    def add(self, call: Any) -> None:
        """A Call that this cache has read; what lies further back than REACH is let go."""
        self.calls = [call for call in self.calls if self.seen - call.before.seen <= REACH] + [call]
        for each in reversed(self.calls):
            if not each.share(self.states):
                break

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, padding included; those before them are then there to stay.

        Raises:
            ValueError: the number is above 0, or more tokens than are recorded.
        """
        held = self.seen - self.calls[0].before.seen if self.calls else 0
        if not -held <= tokens_to_remove <= 0:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}; it must be from {-held} to 0: a GDN2Cache goes back to where "
                f"activate_past_recording() or the last crop found it, and by {REACH} tokens"
            )
        if tokens_to_remove:
            length = self.seen + tokens_to_remove
            call = next(call for call in reversed(self.calls) if call.before.seen <= length)
            there = call.first(length - call.before.seen)
            for name in ("states", "seen", *TENSORS):
                setattr(self, name, getattr(there, name))
        self.calls = self.calls and []

    def reset(self) -> None:
        recorded = self.calls is not None
        self.__init__(len(self))
        if recorded:
            self.activate_past_recording()

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor, all with a batch as first dimension, by ``change(tensor)``."""
        self.states = [state and type(state)(*map(change, state)) for state in self.states]
        self.calls = self.calls and []
        for name in TENSORS:
            tensor = getattr(self, name)
            setattr(self, name, tensor if tensor is None else change(tensor))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda x: x.repeat_interleave(repeats, dim=0))


def name_and_cache(past_key_values: Any, cache: Any) -> tuple[str, Any]:
    """The one of the two, of which transformers gives either, that is given, and its name; None where none is.

    Raises:
        ValueError: two caches are given.
    """
    if past_key_values is None:
        return "cache", cache
    if cache is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two caches; they must be one, the names mean the same argument")
    return "past_key_values", past_key_values
