"""Checks of what models are made of. Each raises ValueError, one sentence with name, value and what is allowed."""

import math
import numbers
from collections.abc import Collection
from typing import Any

from gdn2_titan.ops.dispatch import BACKENDS

__all__ = [
    "check_attention", "check_choice", "check_count", "check_gdn2", "check_number", "check_width", "value_head_dim",
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


def check_gdn2(
    num_heads: int, head_dim: int, num_v_heads: int | None, expand_v: float, conv_size: int, erase_gate: str,
    write_gate: str, tied_gates: bool, decay: str, allow_neg_eigval: bool, output_gate: str, norm_eps: float,
    backend: str,
) -> None:  # fmt: skip
    """Arguments of a GDN-2 layer, by the names that the layer and a model's fields share."""
    check_count("num_heads", num_heads)
    check_count("head_dim", head_dim)
    if num_v_heads is not None:
        check_count("num_v_heads", num_v_heads)
        if num_v_heads % num_heads:
            raise ValueError(f"num_v_heads is {num_v_heads}; it must be a multiple of num_heads = {num_heads}")
    value_head_dim(head_dim, expand_v)
    check_width("conv_size", conv_size)
    for name, value in {"erase_gate": erase_gate, "write_gate": write_gate, "decay": decay}.items():
        check_choice(name, value, ("channel", "scalar"))
    check_choice("output_gate", output_gate, ("silu", "sigmoid"))
    check_choice("backend", backend, (*BACKENDS, "reference"))
    for name, value in {"tied_gates": tied_gates, "allow_neg_eigval": allow_neg_eigval}.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be true or false")
    check_number("norm_eps", norm_eps)


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
