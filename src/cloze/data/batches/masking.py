"""Choose the masked tokens of a sample and what replaces them: a pure function of (seed, sample number).

The rule is BERT's (Devlin et al., 2019, section 3.1), as in `transformers.DataCollatorForLanguageModeling`: each token
that is not special is chosen with probability `mlm_probability`. A chosen token becomes the mask token with
probability `mask_replace_prob`, a random token with probability `random_replace_prob`, and otherwise stays. A
counter-based generator keyed by (seed, sample number) draws the random numbers, so there is no state to save, and
masks do not depend on ranks, batch size or workers. Sample numbers increase over all epochs, so each epoch draws new
masks.

    masking = Masking(mask_token_id=4, vocab_size=50265, special_token_ids=(0, 1, 2, 3, 4), seed=42)
    input_ids, labels = masking.apply(blocks, samples)

With `words` (see `cloze.data.batches.word_boundaries`) whole words are chosen, as in BERT's whole word masking. With
`spans` too, spans of words are chosen (SpanBERT: Joshi et al., 2020, section 3.1). Each token is still chosen with
exactly the given probability. Special tokens count as words and are never masked.

The rate may change during the run (Wettig et al., "Should You Mask 15% in Masked Language Modeling?", 2023; Yang et
al., "Learning Better Masking for Better Language Model Pre-training", 2023): the rate of sample j of N is p + (end -
p) * min(j / (N - 1), 1).

The draws for a block of S tokens (0-based; see `cloze.data.batches.counter_rng`): the key of sample j is
keys_for(make_key(seed, purpose), j). The purpose is 0x747261696E in training and 0x6576616C in evaluation. In
evaluation, j is the block's number plus the number of blocks for each further mask of the block. An event of
probability p happens if its draw is below min(round(p * 2^64), 2^64 - 1).

    draw i                  whether token i is chosen; for words, the draw of the word's first token decides
    draw S + i              what token i becomes: the mask token below mask_replace_prob, a random token below
                            mask_replace_prob + random_replace_prob, itself otherwise
    draw 2 S + i            the random token: number floor((draw >> 32) * V / 2^32) of the V tokens of the
                            vocabulary, special ones included, ordered by id
    draw 3 S + 9 + w        word w of the block begins a span of more than k words, 0 <= k < 10, if this is below
                            q * P(more than k); w = -9 .. -1 are words before the block, whose spans reach into it
    draw 4 S + 19 + w       what all tokens of the span that begins at word w become, by the rule of draw S + i

P(more than k) = (0.8^k - 0.8^10) / (1 - 0.8^10). q is chosen so that a word is in a span with probability p: the
product of 1 - q * P(more than k) over all k is 1 - p. If spans overlap, a word belongs to the span that ends last; of
several with the same end, to the one that begins last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloze.data.batches.counter_rng import U64, draw_at, draws, keys_for, make_key
from cloze.data.batches.word_boundaries import Words

IGNORE_INDEX = -100  # the label of tokens that are not predicted; torch's cross_entropy ignores it
_PURPOSE_TRAIN, _PURPOSE_EVAL = 0x747261696E, 0x6576616C
# SpanBERT's distribution of span lengths: geometric, cut at 10 words and normalized, which gives the paper's mean of
# 3.8 words. LONGER[k] is P(more than k words).
MAX_SPAN = 10
_STAY = 0.8
LONGER = [(_STAY**k - _STAY**MAX_SPAN) / (1 - _STAY**MAX_SPAN) for k in range(MAX_SPAN)]
_HIGH = np.uint64(32)


@dataclass(frozen=True)
class Masking:
    """The masking rule of a run. With `evaluation`, the masks differ from the training masks of the same seed.

    `mlm_probability_end`: the rate at the last of `total_samples` samples, or None if the rate is constant. `words`:
    mask whole words; with `spans`: mask spans of words. `missing_token_ids`: sorted ids below `vocab_size` that no
    token has; they never replace a token.
    """

    mask_token_id: int
    vocab_size: int
    special_token_ids: tuple[int, ...]
    seed: int
    mlm_probability: float = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    evaluation: bool = False
    mlm_probability_end: float | None = None
    total_samples: int = 0
    words: Words | None = None
    spans: bool = False
    missing_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_manifest(
        cls,
        manifest: dict[str, Any],
        seed: int,
        mlm_probability: float = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        **more: Any,
    ) -> Masking:
        """Return the rule for the tokenizer of a prepared folder's manifest; `more` sets further fields."""
        tokenizer = manifest["tokenizer"]
        return cls(
            mask_token_id=tokenizer["mask_token_id"],
            vocab_size=tokenizer["vocab_size"],
            special_token_ids=tuple(tokenizer["special_token_ids"]),
            seed=seed,
            mlm_probability=mlm_probability,
            mask_replace_prob=mask_replace_prob,
            random_replace_prob=random_replace_prob,
            missing_token_ids=tuple(tokenizer.get("missing_token_ids", ())),
            **more,
        )

    def for_evaluation(self) -> Masking:
        """Return the rule with the fixed masks of evaluation: single tokens, at the final rate of the run, so that
        perplexities of different runs are comparable."""
        end = self.mlm_probability if self.mlm_probability_end is None else self.mlm_probability_end
        return replace(self, evaluation=True, mlm_probability=end, mlm_probability_end=None, words=None, spans=False)

    def rates(self, samples: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the probability that a token of each sample is chosen: samples [B] -> [B]."""
        if self.mlm_probability_end is None:
            return np.full(len(samples), self.mlm_probability)
        done = np.clip(samples / max(self.total_samples - 1, 1), 0.0, 1.0)
        return self.mlm_probability + (self.mlm_probability_end - self.mlm_probability) * done

    def apply(
        self, blocks: NDArray[np.int32], samples: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Mask blocks [B, S], which are the samples [B] of the run -> (input_ids, labels), both [B, S] int64.

        Labels are the original token if it is to be predicted, else IGNORE_INDEX.
        """
        size = blocks.shape[1]
        purpose = _PURPOSE_EVAL if self.evaluation else _PURPOSE_TRAIN
        keys = keys_for(make_key(self.seed, purpose), samples)
        chosen, span_of = self._choose(blocks, keys, samples)
        special = np.zeros(max(self.special_token_ids, default=0) + 2, bool)
        special[list(self.special_token_ids)] = True
        chosen &= ~special[np.minimum(blocks, len(special) - 1)]
        rows, columns = np.nonzero(chosen)  # only chosen tokens need further draws
        originals = blocks[rows, columns]
        number = size + columns if span_of is None else 4 * size + MAX_SPAN + span_of[rows, columns]
        action = draw_at(keys[rows], number)
        token = self._replacements(draw_at(keys[rows], 2 * size + columns))
        to_mask = action < _threshold(self.mask_replace_prob)
        to_random = ~to_mask & (action < _threshold(self.mask_replace_prob + self.random_replace_prob))
        shown = np.where(to_mask, self.mask_token_id, np.where(to_random, token, originals))
        input_ids = blocks.astype(np.int64)
        input_ids[rows, columns] = shown
        labels = np.full(blocks.shape, IGNORE_INDEX, np.int64)
        labels[rows, columns] = originals
        return input_ids, labels

    def _replacements(self, drawn: U64) -> NDArray[np.int64]:
        """Return a uniformly distributed token of the vocabulary for each draw: [n] -> [n]."""
        count = self.vocab_size - len(self.missing_token_ids)
        number = (((drawn >> _HIGH) * np.uint64(count)) >> _HIGH).astype(np.int64)
        if not self.missing_token_ids:
            return number
        missing = np.array(self.missing_token_ids, np.int64)
        return number + np.searchsorted(missing - np.arange(len(missing)), number, side="right")

    def _choose(
        self, blocks: NDArray[np.int32], keys: U64, samples: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64] | None]:
        """Return which tokens of blocks [B, S] are chosen, [B, S], and the number of each token's span, [B, S], or
        None."""
        size = blocks.shape[1]
        varies = self.mlm_probability_end is not None
        if self.words is not None and self.spans:
            limits = _span_limits(self.rates(samples)) if varies else _span_limits_at(self.mlm_probability)
            return choose_spans(self.words.starts(blocks), draws(keys, 3 * size, size + MAX_SPAN - 1), limits)
        limit = _thresholds(self.rates(samples))[:, None] if varies else _threshold(self.mlm_probability)
        chosen = draws(keys, 0, size) < limit
        if self.words is None:
            return chosen, None
        first = np.where(self.words.starts(blocks), np.arange(size), 0)
        first = np.maximum.accumulate(first, axis=1)  # of each token's word
        return np.take_along_axis(chosen, first, axis=1), None


def choose_spans(starts: NDArray[np.bool_], drawn: U64, limits: U64) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return which tokens are in a span, [B, S] bool, and the number of their span, [B, S], from word starts [B, S].

    `drawn` [B, S + MAX_SPAN - 1]: draws for each block's words; the first MAX_SPAN - 1 are for words before the block,
    whose spans can reach into it. A word begins a span of more than k words if its draw is below `limits` [B or 1,
    MAX_SPAN][k]. If spans overlap, a word belongs to the one that ends last, then to the one that begins last.
    """
    word = np.cumsum(starts, axis=1, dtype=np.int64) + (MAX_SPAN - 2)  # the number of each token's word
    drawn = drawn[:, : int(word.max(initial=0)) + 1]
    rows, begin = np.nonzero(drawn < limits[:, :1])
    limits = np.broadcast_to(limits, (len(starts), MAX_SPAN))
    lengths = (drawn[rows, begin][:, None] < limits[rows]).sum(axis=1)
    last = np.zeros(drawn.shape, np.int64)  # of the spans begun so far: the last end << 32 | its begin
    last[rows, begin] = (begin + lengths) << 32 | begin
    last = np.take_along_axis(np.maximum.accumulate(last, axis=1), word, axis=1)
    return last >> 32 > word, last & 0xFFFFFFFF


def span_rate(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability q with which a word must begin a span, so that a word is in a span with `rates`: [n] ->
    [n].

    A word is in no span if, for all k = 0, 1, ..., the word k before it begins no span of more than k words: the
    product of 1 - q * P(more than k) over k is 1 - rate. The product is convex and decreasing in q, so Newton's method
    from 0 never overshoots; it stops when q no longer increases. All operations round exactly: every machine gets the
    same bits.
    """
    begins = np.zeros_like(rates)
    for _ in range(200):
        left, slope = np.ones_like(rates), np.zeros_like(rates)
        for longer in LONGER:
            factor = 1 - begins * longer
            slope = slope * factor - left * longer
            left = left * factor
        further = np.minimum(begins - (left - (1 - rates)) / np.minimum(slope, -1e-300), 1.0)
        if not (further > begins).any():
            break
        begins = np.maximum(begins, further)
    return begins


def span_variance(rate: float) -> float:
    """Return the variance of the number of masked words, relative to masking words independently.

    Two words at distance d are both in no span with probability P(the later one is in none) times the product over k <
    d of 1 - q * P(more than k): an earlier span reaches the later word only through the earlier word.
    """
    begins, free, total = float(span_rate(np.array([rate]))[0]), 1.0, 1.0
    for longer in LONGER[:-1]:
        free *= 1 - begins * longer
        total += 2 * (free - (1 - rate)) / rate
    return total


@dataclass(frozen=True)
class MaskUnit:
    """What is masked as a whole: a value of --mask_unit. `needs_words`: of the tokenizer; `fields`: those of `Masking`
    with which it is chosen; `variance`: how many times the variance of the number of masked units is, at a rate, that
    of units masked on their own."""

    needs_words: bool = True
    fields: tuple[tuple[str, Any], ...] = ()
    variance: Callable[[float], float] = lambda rate: 1.0


MASK_UNITS = {
    "token": MaskUnit(needs_words=False),
    "word": MaskUnit(),
    "span": MaskUnit(fields=(("spans", True),), variance=span_variance),
}


def _threshold(probability: float) -> np.uint64:
    """Return the threshold t for which `draw < t` has the given probability."""
    return np.uint64(min(max(0, round(probability * 2.0**64)), 2**64 - 1))


def _thresholds(probabilities: NDArray[np.float64]) -> U64:
    """Return `_threshold` of each element of an array of any shape."""
    below = np.minimum(probabilities, 1 - 2.0**-53) * 2.0**64
    return np.where(probabilities >= 1, np.uint64(2**64 - 1), np.rint(below).astype(np.uint64))


def _span_limits(rates: NDArray[np.float64]) -> U64:
    """Return the `limits` of `choose_spans`: rates [n] -> [n, MAX_SPAN]."""
    return _thresholds(span_rate(rates)[:, None] * np.array(LONGER))


@lru_cache(maxsize=16)
def _span_limits_at(rate: float) -> U64:
    return _span_limits(np.array([rate]))
