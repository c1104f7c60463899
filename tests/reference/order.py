"""Which blocks a step takes, and how many."""

from __future__ import annotations

from reference.counter import key_for, make_key, mix

ORDER = 0x6F72646572


def block_of(sample: int, num_blocks: int, seed: int) -> int:
    """Return the block that is a sample of the run: a Feistel network with cycle walking."""
    epoch, value = divmod(sample, num_blocks)
    key = make_key(seed, ORDER, epoch)
    bits = 2
    while 2**bits < num_blocks:  # the largest number to hold is num_blocks - 1
        bits += 2
    half = 2 ** (bits // 2)
    while True:
        left, right = divmod(value, half)
        for number in range(8):
            left, right = right, left ^ mix((right + key_for(key, number)) % 2**64) % half
        value = left * half + right
        if value < num_blocks:
            return value


def batch_size(step: int, full: int, start: int = 1, warmup_steps: int = 0) -> int:
    """Return the blocks of a step (0-based)."""
    return full if step >= warmup_steps else start + (full - start) * step // warmup_steps


def samples_of(step: int, full: int, start: int = 1, warmup_steps: int = 0) -> range:
    """Return the sample numbers of a step: those after the samples of all steps before it."""
    first = sum(batch_size(before, full, start, warmup_steps) for before in range(step))
    return range(first, first + batch_size(step, full, start, warmup_steps))


def samples_of_rank(samples: range, rank: int, world_size: int, per_device: int) -> list[list[int]]:
    """Return a rank's samples of a step, by micro-batch. Micro-batches are dealt first, ranks next."""
    width = per_device * world_size
    micro_batches = [samples[first : first + width] for first in range(0, len(samples), width)]
    return [list(each[rank * per_device : (rank + 1) * per_device]) for each in micro_batches]
