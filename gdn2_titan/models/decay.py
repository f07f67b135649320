"""The parameters of the decay, which stay exact whatever dtype the model around them is given."""

import math

import torch
from torch import nn

from .checks import check_count
from .init import fill_

__all__ = ["DECAYS", "DecayParameters"]

DECAYS = ("A_log", "dt_bias")


class DecayParameters(nn.Module):
    """A_log [H] and dt_bias [H, K] (or [H, 1] for a scalar decay), in a module of their own: a decay that is rounded to
    bf16 is another decay, and an optimizer's steps on it round to nothing.

    They are fp32 from their birth, or float64 where that is the default dtype. ``to(bfloat16)``, ``half()``, a file in
    16 bits that becomes the parameters, and whatever else gives a dtype to the model around them leave them in fp32:
    from a wider dtype they come unrounded, from a narrower one they are widened. ``double()`` makes them float64.
    bounded: whether the decay has a lower bound, which is of account to where it starts. has_rate: whether there is an
    A_log; else it is None.

    Both carry ``_no_weight_decay``, which trainers look for. Read, never called: see ``gdn2_titan.parallel.fsdp``.
    """

    def __init__(self, num_heads: int, channels: int, bounded: bool = False, has_rate: bool = True) -> None:
        super().__init__()
        check_count("num_heads", num_heads)
        check_count("channels", channels)
        self.bounded = bounded
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_parameter("A_log", nn.Parameter(torch.empty(num_heads, dtype=dtype)) if has_rate else None)
        self.dt_bias = nn.Parameter(torch.empty(num_heads, channels, dtype=dtype))

    def init_weights(self, dt_min: float = 1e-3, dt_max: float = 1e-1) -> None:
        """A ~ U(1, 16); softplus(dt_bias) log-uniform in [dt_min, dt_max]: by default half-lives of 1 to 700 tokens.

        Bounded, A is 1 and the decay is about the bound times that number.
        """

        def draw_dt_bias(x):
            dt = torch.rand_like(x).mul_(math.log(dt_max / dt_min)).add_(math.log(dt_min)).exp_()
            x.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

        if self.A_log is not None:
            fill_(self.A_log, lambda x: x.zero_() if self.bounded else x.uniform_(1, 16).log_())
        fill_(self.dt_bias, draw_dt_bias)

    def _apply(self, fn, recurse=True):
        def exact(x):
            y = fn(x)
            return x.to(y.device, torch.float32) if _is_narrow(y) else y

        super()._apply(exact, recurse)
        self._mark()
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("assign_to_params_buffers"):
            for name in self._parameters:
                given = state_dict.get(prefix + name)
                if isinstance(given, torch.Tensor) and _is_narrow(given):
                    state_dict[prefix + name] = given.float()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._mark()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._mark()

    def __setattr__(self, name, value):
        """nn.Module's. Only past a method of this class does FSDP2 swap parameters by ``register_parameter``."""
        super().__setattr__(name, value)

    def __setstate__(self, state):
        """Of a copy, whose parameters have lost what was noted on them."""
        super().__setstate__(state)
        self._mark()

    def _mark(self):
        for p in self.parameters():
            p._no_weight_decay = True


def _is_narrow(x):
    return x.is_floating_point() and x.dtype.itemsize < 4
