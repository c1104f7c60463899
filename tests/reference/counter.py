"""Random numbers as functions of a key and a counter (SplitMix64), in whole numbers of Python."""

from __future__ import annotations

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """Return the finalizer of SplitMix64 of a number below 2^64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


def make_key(*parts: int) -> int:
    """Return one key of several numbers."""
    key = 0
    for part in parts:
        key = mix(((key ^ part) + GOLDEN) % WORD)
    return key


def key_for(key: int, number: int) -> int:
    """Return the key of one of many streams."""
    return mix(mix((number * GOLDEN + key) % WORD) ^ key)


def draw(key: int, number: int) -> int:
    """Return a draw of a key's stream, below 2^64."""
    return mix((key + (number + 1) * GOLDEN) % WORD)


def is_below(drawn: int, probability: float) -> bool:
    """Return whether what has this probability happens with this draw."""
    return drawn < min(round(probability * WORD), WORD - 1)
