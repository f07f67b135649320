"""Checks of what models are made of. Each raises ValueError, one sentence with name, value and what is allowed."""

import math
import numbers
from collections.abc import Collection
from typing import Any

from gdn2_titan.ops.dispatch import BACKENDS
from gdn2_titan.ops.elementwise import BATCH_INVARIANT
from gdn2_titan.ops.gdn2.arguments import LARGEST

__all__ = [
    "check_attention", "check_choice", "check_count", "check_gdn2", "check_mamba", "check_number", "check_turned",
    "check_width", "rank_of", "value_head_dim",
]  # fmt: skip


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")


def check_number(name: str, value: Any) -> None:
    # Not "value <= 0": NaN is neither.
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a finite number greater than 0")


def check_width(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value not in (2, 3, 4):
        raise ValueError(f"{name} is {value!r}; it must be 2, 3 or 4")


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        *others, last = map(repr, allowed)
        raise ValueError(f"{name} is {value!r}; it must be {', '.join(others)} or {last}")


def value_head_dim(head_dim: int, expand_v: float) -> int:
    """head_dim * expand_v, which must be whole but for the rounding of the product."""
    check_number("expand_v", expand_v)
    size = head_dim * float(expand_v)
    if round(size) < 1 or not math.isclose(round(size), size, rel_tol=1e-9):
        wanted = f"times head_dim = {head_dim} it must be a whole number of at least 1"
        raise ValueError(f"expand_v is {expand_v!r}; {wanted}")
    return round(size)


def rank_of(name: str, value: int | str | None, value_size: int) -> int | None:
    """The inner size of a projection of low rank: ``value`` itself, value_size for "head", and None, no low rank, for
    None and "full"."""
    if value is None or isinstance(value, str) and value == "full":  # a TOML file has no None
        return None
    if isinstance(value, str) and value == "head":
        return value_size
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1, 'head' or 'full'")
    return int(value)


def _check_bound(lower_bound):
    number = isinstance(lower_bound, numbers.Real) and not isinstance(lower_bound, bool)
    if lower_bound is not None and not (number and -LARGEST <= lower_bound < 0):  # of fp32, and no NaN
        raise ValueError(f"lower_bound is {lower_bound!r}; it must be a finite number less than 0")


def check_gdn2(
    num_heads: int, head_dim: int, num_v_heads: int | None, expand_v: float, conv_size: int, erase_gate: str,
    write_gate: str, tied_gates: bool, decay: str, allow_neg_eigval: bool, output_gate: str, norm_eps: float,
    backend: str, lower_bound: float | None, decay_rank: int | str | None, gate_rank: int | str | None,
    content_gate: bool,
) -> None:  # fmt: skip
    """Arguments of a GDN-2 layer, by the names that the layer and a model's fields share."""
    check_count("num_heads", num_heads)
    check_count("head_dim", head_dim)
    if num_v_heads is not None:
        check_count("num_v_heads", num_v_heads)
        if num_v_heads % num_heads:
            raise ValueError(f"num_v_heads is {num_v_heads}; it must be a multiple of num_heads = {num_heads}")
    value_size = value_head_dim(head_dim, expand_v)
    check_width("conv_size", conv_size)
    for name, value in {"erase_gate": erase_gate, "write_gate": write_gate}.items():
        check_choice(name, value, ("channel", "scalar", "mean"))
        if value == "mean" and tied_gates:
            raise ValueError(f"{name} is 'mean'; with tied_gates it must be 'channel' or 'scalar'")
    check_choice("decay", decay, ("channel", "scalar", "none"))
    check_choice("output_gate", output_gate, ("silu", "sigmoid"))
    check_choice("backend", backend, (*BACKENDS, "reference", BATCH_INVARIANT))
    flags = {"tied_gates": tied_gates, "allow_neg_eigval": allow_neg_eigval, "content_gate": content_gate}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be true or false")
    check_number("norm_eps", norm_eps)
    _check_bound(lower_bound)
    rank_of("decay_rank", decay_rank, value_size)
    rank_of("gate_rank", gate_rank, value_size)
    if decay != "channel" and decay_rank not in ("head", "full", None):
        raise ValueError(f"decay_rank is {decay_rank!r}; with decay = {decay!r} it must be left out, or 'full'")
    if decay == "none" and lower_bound is not None:
        raise ValueError(f"lower_bound is {lower_bound!r}; with decay = 'none' it must be left out")
    if content_gate:
        _check_content_gate({"erase_gate": erase_gate, "write_gate": write_gate}, tied_gates, backend)


def _check_content_gate(gates, tied_gates, backend):
    for name, value in gates.items():
        if value == "mean":
            raise ValueError(f"{name} is 'mean'; with content_gate it must be 'channel' or 'scalar'")
    if tied_gates:
        raise ValueError("tied_gates is True; with content_gate, which is of the erase gate alone, it must be false")
    if backend == BATCH_INVARIANT:
        raise ValueError(f"backend is {backend!r}; with content_gate it must be another one")


def check_mamba(sizes: dict[str, int], norm_eps: float, backend: str) -> None:
    """Arguments of a Mamba layer. sizes: by what they are called where they come from."""
    for name, size in sizes.items():
        check_count(name, size)
    check_number("norm_eps", norm_eps)
    if backend == BATCH_INVARIANT:
        raise ValueError(f"backend is {backend!r}; of Mamba layers it must be another one")
    check_choice("backend", backend, (*BACKENDS, "reference"))


def check_turned(name: str, state_size: int) -> None:
    """Of Mamba-3, which turns half of the channels of a key in pairs."""
    if state_size % 4:
        raise ValueError(f"{name} is {state_size}; of Mamba-3 layers it must be a multiple of 4")


def check_attention(
    hidden_size: int, num_heads: int, num_kv_heads: int | None, heads: str = "num_heads", kv_heads: str = "num_kv_heads"
) -> None:
    """Arguments of a softmax layer. heads, kv_heads: what they are called where they come from."""
    check_count("hidden_size", hidden_size)
    check_count(heads, num_heads)
    if hidden_size % num_heads or hidden_size // num_heads % 2:
        raise ValueError(f"{heads} is {num_heads}; it must divide hidden_size = {hidden_size} into heads of even size")
    if num_kv_heads is not None:
        check_count(kv_heads, num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"{kv_heads} is {num_kv_heads}; it must divide {heads} = {num_heads}")
