"""Build the micro-batch of some samples: masks, positions to predict, and the documents in each block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloze.data.batches.masking import IGNORE_INDEX, MASK_UNITS, Masking

TOKENS_PER_WORD = 3.0  # of the word of a token, on average: 1.1 on ELI5 with RoBERTa's, 2.7 with 600 tokens
_TOKENS_PER_DOCUMENT = 16
_ROWS = 8  # places to predict are padded to a multiple of this


def make_batch(
    ids: NDArray[np.int32],
    segments: NDArray[np.int32] | None,
    masking: Masking,
    samples: NDArray[np.int64],
    num_samples: int,
    capacity: int = 0,
) -> dict[str, torch.Tensor]:
    """Mask blocks [B, S] that are samples [B] of the run; places without a sample (-1) and samples from `num_samples`
    on get no labels. `capacity`: at least so many places to predict, padded with ones whose target is ignored."""
    input_ids, labels = masking.apply(ids, np.maximum(samples, 0))
    labels[(samples < 0) | (samples >= num_samples)] = IGNORE_INDEX
    masked = np.flatnonzero(labels.reshape(-1) != IGNORE_INDEX)
    size = max(capacity, _ROWS, -(-len(masked) // _ROWS) * _ROWS)
    positions, targets = np.zeros(size, np.int64), np.full(size, IGNORE_INDEX, np.int64)
    positions[: len(masked)], targets[: len(masked)] = masked, labels.reshape(-1)[masked]
    arrays: dict[str, NDArray[Any]] = {
        "input_ids": input_ids,
        "labels": labels,
        "positions": positions,
        "targets": targets,
    }
    if segments is not None:
        arrays["segments"] = segments
        arrays["document_offsets"] = document_offsets(segments)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def fixed_capacity(num_tokens: int, mlm_probability: float, mask_unit: str = "token") -> int:
    """Return the number of predictions that a micro-batch of `num_tokens` has room for, a multiple of 64: six standard
    deviations above the mean of a binomial distribution, so that one in 10^9 has more (and is computed with another
    shape).

    Where whole words are masked, the variance is that of the binomial one times the tokens of the word that a token is
    in, on average: TOKENS_PER_WORD is above what texts have. Of other units of words, it is that times
    `MaskUnit.variance`. A text of much longer words has other shapes more often, and the same numbers.
    """
    mean = num_tokens * mlm_probability
    variance = mean * (1 - mlm_probability)
    if MASK_UNITS[mask_unit].needs_words:
        variance *= TOKENS_PER_WORD * MASK_UNITS[mask_unit].variance(mlm_probability)
    wanted = math.ceil(mean + 6 * math.sqrt(variance))
    return min(num_tokens, -(-wanted // 64) * 64)


def document_offsets(segments: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return [capacity + 1] from segments [B, S]: where each document begins in the B * S tokens, then their number.

    The last is repeated up to a fixed length (documents of no tokens, to flash attention), so that torch.compile sees
    one shape: room for documents of 16 tokens on average, doubled for blocks that hold more of them. Made here, where
    counting them is not waiting for a GPU.
    """
    batch, length = segments.shape
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = np.flatnonzero(begins)
    capacity = batch * max(1, length // _TOKENS_PER_DOCUMENT)
    while capacity < len(starts):
        capacity *= 2
    offsets = np.full(capacity + 1, batch * length, np.int32)
    offsets[: len(starts)] = starts
    return offsets


def count_masked(micro_batches: list[dict[str, torch.Tensor]]) -> int:
    """Return the tokens to predict."""
    return sum(int(np.count_nonzero(batch["targets"].numpy() != IGNORE_INDEX)) for batch in micro_batches)
