"""The quantities that are shown of each token: their names, what they mean, and the colours for them."""

from typing import NamedTuple

__all__ = ["QUANTITIES", "Quantity", "colours_of"]


class Quantity(NamedTuple):
    title: str
    meaning: str
    scale: str  # "gate": from 0 to what the gate reaches; "log"; "norm": from 0 to the largest


QUANTITIES = {
    "erase": Quantity("erase gate", "b, mean over key channels", "gate"),
    "write": Quantity("write gate", "w, mean over value channels", "gate"),
    "half_life": Quantity("half-life", "tokens until a channel has decayed by half, median over key channels", "log"),
    "erased": Quantity("erased norm", "Frobenius norm of k (b * k)ᵀ Diag(exp g) S, which this token takes out", "norm"),
    "written": Quantity("written norm", "Frobenius norm of k (w * v)ᵀ, which this token puts in", "norm"),
    "decayed": Quantity(
        "decayed", "what the decay takes of the memory's Frobenius norm before this token edits it", "norm"
    ),
    "state": Quantity("state norm", "Frobenius norm of the memory S after this token", "norm"),
}


def colours_of(scale, reach=1.0):
    """The name of matplotlib's colour map. reach: what the gate reaches; from 0 to 2, colours part at 1."""
    if scale == "gate" and reach > 1:
        return "PuOr"
    return "magma" if scale == "norm" else "viridis"
