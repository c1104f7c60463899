"""Which tokens of a block are masked, and by what: single tokens, words or spans of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from reference.counter import draw, is_below, key_for, make_key

TRAINING, EVALUATION = 0x747261696E, 0x6576616C
IGNORED = -100
LONGEST_SPAN = 10
LONGER = [(0.8**k - 0.8**LONGEST_SPAN) / (1 - 0.8**LONGEST_SPAN) for k in range(LONGEST_SPAN)]


@dataclass(frozen=True)
class Rule:
    """How blocks are masked. `unit`: token, word or span. `end`: the rate at the last of `total_samples` samples.
    Shorter texts are padded to `block_size`."""

    tokenizer: Any
    seed: int
    rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    unit: str = "token"
    end: float | None = None
    total_samples: int = 0
    evaluation: bool = False
    block_size: int = 0

    def rate_of(self, sample: int) -> float:
        """Return the probability with which a token of a sample is masked."""
        if self.end is None:
            return self.rate
        return self.rate + (self.end - self.rate) * min(sample / (self.total_samples - 1), 1.0)

    def mask(self, text: Sequence[int], sample: int) -> tuple[list[int], list[int]]:
        """Return input_ids and labels of a block, [S] each."""
        block = [*text, *[self.tokenizer.pad_token_id] * (self.block_size - len(text))]
        size, special = len(block), set(self.tokenizer.all_special_ids)
        tokens = sorted(self.tokenizer.get_vocab().values())
        key = key_for(make_key(self.seed, EVALUATION if self.evaluation else TRAINING), sample)
        rate = self.rate_of(sample)
        if self.unit == "token":
            actions = {i: size + i for i in range(size) if is_below(draw(key, i), rate)}
        elif self.unit == "word":
            first = first_of_words(word_starts(block, self.tokenizer))
            actions = {i: size + i for i in range(size) if is_below(draw(key, first[i]), rate)}
        else:
            actions = span_actions(word_starts(block, self.tokenizer), key, rate)
        input_ids, labels = list(block), [IGNORED] * size
        for i, number in actions.items():
            if block[i] in special:
                continue
            labels[i] = block[i]
            action = draw(key, number)
            if is_below(action, self.mask_share):
                input_ids[i] = self.tokenizer.mask_token_id
            elif is_below(action, self.mask_share + self.random_share):
                input_ids[i] = tokens[(draw(key, 2 * size + i) >> 32) * len(tokens) >> 32]
        return input_ids, labels


def word_starts(block: Sequence[int], tokenizer: Any) -> list[bool]:
    """Return for each token whether it begins a word: of WordPiece, and of byte-level BPE where the text is ASCII."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    tokens = tokenizer.convert_ids_to_tokens(list(block))
    if tokenizer.backend_tokenizer.model.__class__.__name__ == "WordPiece":
        starts = [not token.startswith("##") for token in tokens]
    else:
        starts = [False] * len(block)
        edges = [-1, *(i for i, token in enumerate(block) if token in special), len(block)]
        for before, after in pairwise(edges):
            run = tokens[before + 1 : after]
            text = tokenizer.convert_tokens_to_string(run)
            assert text.isascii()
            begins, place = set(), 0
            for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text):
                begins.add(place)
                place += len(word)
            place = 0
            for i, token in enumerate(run, before + 1):
                starts[i] = place in begins
                place += len(token)
    return [begins or i == 0 or block[i] in special or block[i - 1] in special for i, begins in enumerate(starts)]


def first_of_words(starts: Sequence[bool]) -> list[int]:
    """Return for each token the place of the first token of its word."""
    found: list[int] = []
    for i, begins in enumerate(starts):
        found.append(i if begins else found[-1])
    return found


def span_actions(starts: Sequence[bool], key: int, rate: float) -> dict[int, int]:
    """Return the tokens that are in a span, each with the number of the draw that decides what they become."""
    size, begin_rate = len(starts), rate_of_beginnings(rate)
    spans = []  # (end, first word): words before the block have numbers below 0
    for word in range(1 - LONGEST_SPAN, sum(starts)):
        drawn = draw(key, 3 * size + LONGEST_SPAN - 1 + word)
        length = sum(is_below(drawn, begin_rate * longer) for longer in LONGER)
        if length:
            spans.append((word + length, word))
    actions, word = {}, -1
    for i, begins in enumerate(starts):
        word += begins
        over = [(end, first) for end, first in spans if first <= word < end]
        if over:
            actions[i] = 4 * size + 2 * LONGEST_SPAN - 1 + max(over)[1]
    return actions


def rate_of_beginnings(rate: float) -> float:
    """Return with which probability a word begins a span, so that each word is in one with probability `rate`."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        free = 1.0
        for longer in LONGER:
            free *= 1 - middle * longer
        low, high = (middle, high) if free > 1 - rate else (low, middle)
    return high
