"""Perplexity with its interval, and pseudo-log-likelihoods, one block or token at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from reference.masks import IGNORED, Rule
from reference.packing import flat
from reference.training import block_logits, piece_logits


@dataclass(frozen=True)
class Perplexity:
    """The mean loss of a masked token, its 95 % interval, the masked tokens, and the share that was predicted."""

    loss: float
    interval: tuple[float, float]
    masked_tokens: int
    accuracy: float
    accuracy_top5: float


@torch.no_grad()
def perplexity(model: Any, blocks: Sequence[Sequence[Sequence[int]]], rule: Rule, draws: int = 1) -> Perplexity:
    """Score all blocks with `draws` fixed masks each; `rule` is one of evaluation."""
    model = model.double().eval()
    sums, counts, best, best5 = [0.0] * len(blocks), [0] * len(blocks), 0, 0
    for number, block in enumerate(blocks):
        for again in range(draws):
            input_ids, labels = rule.mask(flat(block), number + again * len(blocks))
            logits = block_logits(model, block, input_ids)
            for scores, label in zip(logits, labels, strict=False):
                if label != IGNORED:
                    counts[number] += 1
                    sums[number] += float(scores.logsumexp(-1) - scores[label])
                    better = int((scores > scores[label]).sum())
                    best, best5 = best + (better < 1), best5 + (better < 5)
    total, n = sum(counts), len(blocks)
    loss = sum(sums) / total
    scatter = sum((s - loss * c) ** 2 for s, c in zip(sums, counts, strict=True))
    error = math.sqrt(n / (n - 1) * scatter) / total
    half = 1.959963984540054 * error
    return Perplexity(loss, (loss - half, loss + half), total, best / total, best5 / total)


@torch.no_grad()
def pseudo_log_likelihood(model: Any, tokenizer: Any, text: str, word_l2r: bool) -> tuple[float, int]:
    """Return the sum of the log-probabilities of a sentence's tokens, each from the others, and their number.

    With `word_l2r` later tokens of a token's word are masked too. A tokenizer without words has one for each token.
    """
    model = model.double().eval()
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids = encoded["input_ids"]
    words = encoded.word_ids() if tokenizer.is_fast else list(range(len(ids)))
    places = [i for i, special in enumerate(encoded["special_tokens_mask"]) if not special]
    total = 0.0
    for place in places:
        hidden = {place}
        if word_l2r:
            hidden |= {i for i in places if i > place and words[i] == words[place]}
        masked = [tokenizer.mask_token_id if i in hidden else token for i, token in enumerate(ids)]
        logits = piece_logits(model, ids, masked)[place]
        total += float(logits[ids[place]] - logits.logsumexp(-1))
    return total, len(places)
