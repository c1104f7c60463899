"""Which tokens of a sample are masked, and by what: a pure function of (seed, sample number).

BERT's rule (Devlin et al., 2019, section 3.1) as `transformers.DataCollatorForLanguageModeling` applies it: every
token that is not special is chosen with `mlm_probability`; of the chosen ones `mask_replace_prob` become the mask
token, `random_replace_prob` a random token, the rest stay. The random numbers come from a counter-based generator
keyed by (seed, sample number), so there is no state to save, and the masks do not depend on ranks, batch size or
workers. Every pass over the data draws new masks, since sample numbers go on counting.

    masking = Masking(mask_token_id=4, vocab_size=50265, special_token_ids=(0, 1, 2, 3, 4), seed=42)
    input_ids, labels = masking.apply(blocks, samples)

With `words` (see `cloze.data.batches.word_boundaries`) what is chosen are whole words, as in BERT's whole word
masking, or, with `spans` too, spans of words (SpanBERT: Joshi et al., 2020, section 3.1). Either way every token is
chosen with the same probability, exactly; special tokens count as words, and are never masked.

The rate may change over the run (rates: Wettig et al., "Should You Mask 15% in Masked Language Modeling?", 2023;
decay: Yang et al., "Learning Better Masking for Better Language Model Pre-training", 2023): sample j of N has the rate
p + (end - p) * min(j / (N - 1), 1).

Which draw decides what, in a block of S tokens (0-based; see `cloze.data.batches.counter_rng`): the key of sample j is
keys_for(make_key(seed, purpose), j), with the purpose 0x747261696E in training and 0x6576616C in evaluation, where the
sample number is the block's number, plus the number of blocks for each further mask of it. Something of probability p
happens if its draw is below min(round(p * 2^64), 2^64 - 1).

    draw i                  whether token i is chosen; of words: the draw of the word's first token decides for all
    draw S + i              what token i becomes: the mask token below mask_replace_prob, a random token below
                            mask_replace_prob + random_replace_prob, itself otherwise
    draw 2 S + i            the random token: the one numbered floor((draw >> 32) * V / 2^32) of the V tokens of the
                            vocabulary, special ones included, in the order of their ids
    draw 3 S + 9 + w        word w of the block begins a span of more than k words, 0 <= k < 10, if this is below
                            q * P(more than k); w = -9 .. -1 are words before the block, whose spans reach into it
    draw 4 S + 19 + w       what all tokens of the span that word w begins become, as draw S + i decides it

P(more than k) = (0.8^k - 0.8^10) / (1 - 0.8^10). q is such that a word is in a span with probability p: the product
of 1 - q * P(more than k) over all k is 1 - p. Of two spans that overlap, a word belongs to the one that ends last, of
two with one end to the one that begins last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloze.data.batches.counter_rng import U64, draw_at, draws, keys_for, make_key
from cloze.data.batches.word_boundaries import Words

IGNORE_INDEX = -100  # the label of tokens that are not predicted; torch's cross_entropy ignores it
_PURPOSE_TRAIN, _PURPOSE_EVAL = 0x747261696E, 0x6576616C
# Of a span: P(more than k words), k = 0, 1, ...: geometric, at most 10 words. As in SpanBERT's code the distribution
# is cut and made to sum to 1, which gives the mean of 3.8 words that the paper states.
MAX_SPAN = 10
_STAY = 0.8
LONGER = [(_STAY**k - _STAY**MAX_SPAN) / (1 - _STAY**MAX_SPAN) for k in range(MAX_SPAN)]
_HIGH = np.uint64(32)


@dataclass(frozen=True)
class Masking:
    """The masking rule of a run. `evaluation` draws masks apart from the training ones of the same seed.

    `mlm_probability_end`: the rate at the last of `total_samples` samples, if it changes. `words`: mask whole words;
    with `spans`: mask spans of them. `missing_token_ids`: ids below `vocab_size` that no token has, in order; they are
    never a random replacement.
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
        """The rule for the tokenizer of a prepared folder's manifest; `more`: further fields."""
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
        """The same rule with the fixed masks of evaluation, which training never draws: single tokens, at the rate
        with which the run ends, so that perplexities can be compared."""
        end = self.mlm_probability if self.mlm_probability_end is None else self.mlm_probability_end
        return replace(self, evaluation=True, mlm_probability=end, mlm_probability_end=None, words=None, spans=False)

    def rates(self, samples: NDArray[np.int64]) -> NDArray[np.float64]:
        """The probability with which a token of each sample is chosen: samples [B] -> [B]."""
        if self.mlm_probability_end is None:
            return np.full(len(samples), self.mlm_probability)
        done = np.clip(samples / max(self.total_samples - 1, 1), 0.0, 1.0)
        return self.mlm_probability + (self.mlm_probability_end - self.mlm_probability) * done

    def apply(
        self, blocks: NDArray[np.int32], samples: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Mask blocks [B, S] that are samples [B] of the run -> (input_ids, labels), both [B, S] int64.

        labels hold the original token where it is to be predicted, IGNORE_INDEX elsewhere.
        """
        size = blocks.shape[1]
        purpose = _PURPOSE_EVAL if self.evaluation else _PURPOSE_TRAIN
        keys = keys_for(make_key(self.seed, purpose), samples)
        chosen, span_of = self._choose(blocks, keys, samples)
        special = np.zeros(max(self.special_token_ids, default=0) + 2, bool)
        special[list(self.special_token_ids)] = True
        chosen &= ~special[np.minimum(blocks, len(special) - 1)]
        rows, columns = np.nonzero(chosen)  # what becomes of a token is drawn for the chosen ones only
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
        """Return a token for each draw, all tokens of the vocabulary being equally likely: [n] -> [n]."""
        count = self.vocab_size - len(self.missing_token_ids)
        number = (((drawn >> _HIGH) * np.uint64(count)) >> _HIGH).astype(np.int64)
        if not self.missing_token_ids:
            return number
        missing = np.array(self.missing_token_ids, np.int64)
        return number + np.searchsorted(missing - np.arange(len(missing)), number, side="right")

    def _choose(
        self, blocks: NDArray[np.int32], keys: U64, samples: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64] | None]:
        """The tokens of blocks [B, S] that are chosen, [B, S]; of spans also which span each is in, [B, S]."""
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
    """Which tokens are in a span, and in which: starts [B, S] of words -> [B, S] bool, [B, S] number of the span.

    `drawn`: [B, S + MAX_SPAN - 1] for the words of each block, the first MAX_SPAN - 1 of them before its beginning, so
    that spans can reach into it. A word begins a span of more than k words where its draw is below `limits`
    [B or 1, MAX_SPAN][k]. Where spans overlap, a word belongs to the one that ends last; of those to the last one.
    """
    word = np.cumsum(starts, axis=1, dtype=np.int64) + (MAX_SPAN - 2)  # the number of each token's word
    drawn = drawn[:, : int(word.max(initial=0)) + 1]
    rows, begin = np.nonzero(drawn < limits[:, :1])
    limits = np.broadcast_to(limits, (len(starts), MAX_SPAN))
    lengths = (drawn[rows, begin][:, None] < limits[rows]).sum(axis=1)
    last = np.zeros(drawn.shape, np.int64)  # of the spans that begin up to a word the last end, and which one it is
    last[rows, begin] = (begin + lengths) << 32 | begin
    last = np.take_along_axis(np.maximum.accumulate(last, axis=1), word, axis=1)
    return last >> 32 > word, last & 0xFFFFFFFF


def span_rate(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """With which probability a word must begin a span for every word to be in one with probability `rates`: both [n].

    A word is in none if no word k before it, k = 0, 1, ..., begins one of more than k words: the product over k of
    1 - q * P(more than k) is 1 - rate. In q this is convex and falls, so that Newton's steps from 0 never go too far;
    one that does not go on ends it. Nothing but exactly rounded arithmetic: the same bits on every machine.
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
    """How many times the variance of the number of masked words is that of words masked on their own.

    Two words at a distance d are both in no span with the probability that the later one is in none, times the product
    over k < d of 1 - q * P(more than k): a span from before reaches the later one only through the earlier one.
    """
    begins, free, total = float(span_rate(np.array([rate]))[0]), 1.0, 1.0
    for longer in LONGER[:-1]:
        free *= 1 - begins * longer
        total += 2 * (free - (1 - rate)) / rate
    return total


def _threshold(probability: float) -> np.uint64:
    """`draw < _threshold(p)` happens with probability p."""
    return np.uint64(min(max(0, round(probability * 2.0**64)), 2**64 - 1))


def _thresholds(probabilities: NDArray[np.float64]) -> U64:
    """The same for an array of any shape."""
    below = np.minimum(probabilities, 1 - 2.0**-53) * 2.0**64
    return np.where(probabilities >= 1, np.uint64(2**64 - 1), np.rint(below).astype(np.uint64))


def _span_limits(rates: NDArray[np.float64]) -> U64:
    """rates [n] -> [n, MAX_SPAN], for `choose_spans`."""
    return _thresholds(span_rate(rates)[:, None] * np.array(LONGER))


@lru_cache(maxsize=16)
def _span_limits_at(rate: float) -> U64:
    return _span_limits(np.array([rate]))
