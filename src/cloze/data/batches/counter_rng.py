"""A counter-based generator: numbers that depend on a key and a counter, and on nothing that happened before.

SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014): the k-th output of a
stream is `mix64(key + (k + 1) * GOLDEN)`, so any draw can be had without the ones before it. All arithmetic is on
unsigned 64-bit integers modulo 2^64: the same bits on every machine.

    GOLDEN = 0x9E3779B97F4A7C15
    mix64(x):             x ^= x >> 30, x *= 0xBF58476D1CE4E5B9, x ^= x >> 27, x *= 0x94D049BB133111EB, x ^= x >> 31
    make_key(a, b, ...):  key = 0, then for each part key = mix64((key ^ part) + GOLDEN)
    keys_for(key, n):     mix64(mix64(n * GOLDEN + key) ^ key)
    draw k of a key:      mix64(key + (k + 1) * GOLDEN), k = 0, 1, ...
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
U64 = NDArray[np.uint64]


def mix64(x: U64) -> U64:
    """Return the finalizer of SplitMix64: a bijection of 64-bit integers that scatters every input bit. Any shape."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def make_key(*parts: int) -> np.uint64:
    """Return one 64-bit key made from several integers (seed, purpose, ...); the order of the parts matters."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = mix64((key ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF)) + GOLDEN)
    return key[0]


def keys_for(key: np.uint64, counters: NDArray[np.int64]) -> U64:
    """Return one stream key per counter. counters: [...] -> keys: [...]"""
    return mix64(mix64(counters.astype(np.uint64) * GOLDEN + key) ^ key)


def draws(keys: U64, start: int, count: int) -> U64:
    """Return draws number start .. start + count - 1 of each key's stream. keys: [B] -> [B, count], uniform in [0,
    2^64)."""
    steps = (np.arange(start + 1, start + count + 1, dtype=np.uint64)) * GOLDEN
    return mix64(keys[:, None] + steps[None, :])


def draw_at(keys: U64, numbers: NDArray[np.int64]) -> U64:
    """Draw number `numbers[i]` of the stream of `keys[i]`. Both [n] -> [n], uniform in [0, 2^64)."""
    return mix64(keys + (numbers.astype(np.uint64) + np.uint64(1)) * GOLDEN)
