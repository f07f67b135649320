"""The words of a needle in a haystack: what is told, how it is asked for, and the codes.

The recall task ``needle`` trains on them (``titan/tasks/needle.py``), and ``evaluate`` asks for them. The idea is that
of RULER (arXiv 2404.06654); the sentences are ours.
"""

from collections.abc import Sequence

__all__ = [
    "CODE_DIGITS", "FIRST", "INTRODUCTION", "KEYS", "NEEDLE", "NOISE", "QUESTION", "SECOND", "UUID_DIGITS", "key_of",
    "spell",
]  # fmt: skip

# A key is one word of each; words of different sound and length, as names would be.
FIRST = (
    "amber", "bitter", "copper", "distant", "early", "faded", "gentle", "hollow", "idle", "jagged", "kindly", "lunar",
    "mossy", "narrow", "olive", "patient", "quiet", "rusty", "silver", "tidal", "upper", "velvet", "winter", "young",
)  # fmt: skip
SECOND = (
    "anchor", "barrel", "canyon", "dragonfly", "engine", "falcon", "garden", "harbor", "island", "jacket", "kettle",
    "lantern", "meadow", "needle", "orchard", "piano", "quarry", "ribbon", "saddle", "tunnel", "umbrella", "violin",
    "window", "zebra",
)  # fmt: skip
KEYS = len(FIRST) * len(SECOND)
CODE_DIGITS, UUID_DIGITS = 7, 32

NOISE = "The tide comes in and the tide goes out. Gulls wait on the wall. Nothing else happens here. "
INTRODUCTION = "A code is told somewhere below. It is asked for at the end.\n"
NEEDLE = ("\nThe code of the {key} is ", ".\n")
QUESTION = "\nWhich code was told? The code of the {key} is "


def key_of(number: int) -> str:
    """Key 0 .. KEYS - 1: two words."""
    return f"{FIRST[number // len(SECOND)]} {SECOND[number % len(SECOND)]}"


def spell(digits: Sequence[int]) -> str:
    """The code of CODE_DIGITS decimal digits, a number, or of UUID_DIGITS hexadecimal ones, a UUID."""
    text = "".join("0123456789abcdef"[digit] for digit in digits)
    if len(text) != UUID_DIGITS:
        return text
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
