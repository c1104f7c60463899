"""Which block is sample j of a run: a pure function of (seed, number of blocks, j), in O(1) memory.

Sample j is block `perm(seed, epoch)(j mod n)` with `epoch = j // n`: every epoch visits every block once, in an order
of its own. Global step s of a run takes the samples [s * G, (s + 1) * G), G being the global batch size; while that
still grows, `cloze.data.batches.batch_size_warmup` gives the first sample of a step. Which rank computes which of them
does not change the result. So a position in the data is one integer, and resuming is a seek.

    samples = step_samples(global_step=7, micro_step=0, per_device=8, accumulation=2, rank=1, world_size=4)
    blocks = block_indices(samples, num_blocks=10**11, seed=42)

The permutation is a Feistel network (Luby and Rackoff, 1988) on the smallest even number of bits, 2h >= 2, that holds
n - 1, made to fit n by cycle walking: an image outside [0, n) is encrypted again until it falls inside (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Fewer than 4 rounds of walking are expected.

With the functions of `cloze.data.batches.counter_rng`: key = make_key(seed, 0x6F72646572, epoch), k_r = keys_for(key,
r). A number is left * 2^h + right, and each of 8 rounds r = 0 .. 7 makes (left, right) of it

    (right, left ^ (mix64(right + k_r) mod 2^h))

A step's samples are dealt to micro-batches first and to ranks next: rank r of W takes, in its micro-batch m of B
blocks, the B samples from number (m * W + r) * B of the step on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloze.data.batches.counter_rng import keys_for, make_key, mix64

_ROUNDS = 8
_PURPOSE_ORDER = 0x6F72646572  # keeps the order's keys apart from the masks'


def step_samples(
    global_step: int,
    micro_step: int,
    per_device: int,
    accumulation: int,
    rank: int,
    world_size: int,
    global_batch: int | None = None,
    first_sample: int | None = None,
) -> NDArray[np.int64]:
    """Return the sample numbers of one micro-batch of one rank: [per_device] int64.

    `global_batch`: samples of the step, if fewer than the product of the three (a batch of 8 on 3 ranks); positions
    left over are -1. `first_sample`: the first sample of the step, if steps differ in size.
    """
    places = per_device * accumulation * world_size
    size = places if global_batch is None else global_batch
    if not 0 < size <= places:
        raise ValueError(f"{size} samples do not fit into {places} places")
    begin = global_step * size if first_sample is None else first_sample
    first = (micro_step * world_size + rank) * per_device
    slots = np.arange(first, first + per_device, dtype=np.int64)
    return np.where(slots < size, begin + slots, -1)


def block_indices(samples: NDArray[np.int64], num_blocks: int, seed: int) -> NDArray[np.int64]:
    """Return the block of each sample: samples [B] int64, each >= 0 -> [B] int64 in [0, num_blocks)."""
    out = np.empty_like(samples)
    epochs = samples // num_blocks
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permute(samples[here] % num_blocks, num_blocks, make_key(seed, _PURPOSE_ORDER, int(epoch)))
    return out


def permute(positions: NDArray[np.int64], size: int, key: np.uint64) -> NDArray[np.int64]:
    """Apply a keyed bijection of [0, size): positions [B] int64 -> [B] int64. ValueError if out of range."""
    if len(positions) and (positions.min() < 0 or positions.max() >= size):
        raise ValueError(f"positions must be in [0, {size})")
    half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    half_mask = np.uint64((1 << int(half_bits)) - 1)
    round_keys = keys_for(key, np.arange(_ROUNDS, dtype=np.int64))
    values = positions.astype(np.uint64)
    walking = np.ones(len(values), bool)
    while walking.any():
        left, right = values[walking] >> half_bits, values[walking] & half_mask
        for round_key in round_keys:
            left, right = right, left ^ (mix64(right + round_key) & half_mask)
        values[walking] = (left << half_bits) | right
        walking = values >= np.uint64(size)
    return values.astype(np.int64)
