"""Masks match the reference in boundary cases: one token, added tokens, `<unk>` in a word, rates of 0 and 1."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, tokenizer_of
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cloze.data.batches.collator import MaskingCollator
from cloze.data.batches.masking import IGNORE_INDEX, LONGER, MAX_SPAN, Masking, choose_spans, span_variance
from cloze.data.batches.word_boundaries import words_of
from cloze.errors import ConfigError, DataError
from reference.counter import draw, key_for, make_key
from reference.masks import TRAINING, Rule, rate_of_beginnings, word_starts

FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)


cached_words = cache(words_of)


def masking_of(tokenizer: Any, rule: Rule) -> Masking:
    """Return Cloze's `Masking` for a rule of the reference."""
    return Masking(
        tokenizer.mask_token_id,
        len(tokenizer),
        tuple(tokenizer.all_special_ids),
        rule.seed,
        rule.rate,
        rule.mask_share,
        rule.random_share,
        mlm_probability_end=rule.end,
        total_samples=rule.total_samples,
        words=None if rule.unit == "token" else cached_words(tokenizer),
        spans=rule.unit == "span",
    )


@st.composite
def masked(choose: Any) -> tuple[Rule, list[list[int]], list[int]]:
    """Draw a rule, blocks of any tokens, and their sample numbers."""
    tokenizer = tokenizer_of(choose(st.sampled_from(["WordPiece", "ByteLevel"])))
    shares = choose(st.sampled_from([(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5)]))
    end, total = choose(st.sampled_from([(None, 0), (0.0, 2), (1.0, 2), (0.5, 3), (0.2, 1000)]))
    unit = choose(st.sampled_from(["token", "word", "span"]))
    rate = choose(st.sampled_from([1e-20, 0.15, 0.5, 1.0]))
    rule = Rule(tokenizer, choose(st.integers(0, 2**63)), rate, *shares, unit, end, total)
    size = choose(st.sampled_from([1, 2, 3, 10, 11, 16, 25]))
    block = st.lists(st.integers(0, len(tokenizer) - 1), min_size=size, max_size=size)
    blocks = choose(st.lists(block, min_size=1, max_size=4))
    samples = st.sampled_from([0, 1, 2, max(total - 1, 0), total, 2**40])
    return rule, blocks, choose(st.lists(samples, min_size=len(blocks), max_size=len(blocks)))


@settings(FEW, max_examples=50)
@given(masked())
def test_masks_of_any_tokens_match_the_reference(case: tuple[Rule, list[list[int]], list[int]]):
    rule, blocks, samples = case
    masking = masking_of(rule.tokenizer, rule)
    last = rule.rate if rule.end is None else rule.end
    fixed = replace(rule, rate=last, end=None, unit="token", evaluation=True)
    for ours, theirs in ((masking, rule), (masking.for_evaluation(), fixed)):
        found = ours.apply(np.array(blocks, np.int32), np.array(samples, np.int64))
        for block, sample, input_ids, labels in zip(blocks, samples, *found, strict=True):
            assert (input_ids.tolist(), labels.tolist()) == theirs.mask(block, sample)


@pytest.mark.parametrize("kind", ["WordPiece", "ByteLevel"])
def test_words_of_any_three_tokens_match_the_reference(kind: str):
    """The tokens include special and added ones and `<unk>`."""
    tokenizer = tokenizer_of(kind)
    blocks = list(product(range(len(tokenizer)), repeat=3))
    expected = [word_starts(block, tokenizer) for block in blocks]
    assert words_of(tokenizer).starts(np.array(blocks, np.int32)).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_any_three_parts_of_a_text_match_the_tokenizer(kind: str):
    """Added and special tokens are words; `<unk>` is a part of the word in which the tokenizer produces it."""
    unknown = {"ByteLevel": "ab", "suffix": "Xa"}.get(
        kind, "X"
    )  # a word that ends with `<unk>` lacks the suffix that marks its end
    tokenizer = tokenizer_of(kind)
    words = words_of(tokenizer)
    for parts in product(["a", "b", " ", unknown, ".", "new", ".new", "<mask>"], repeat=3):
        encoded = tokenizer("".join(parts), add_special_tokens=False)
        numbers = [-1, *encoded.word_ids()]
        expected = [one != other for one, other in pairwise(numbers)]
        if expected:
            assert words.starts(np.array([encoded["input_ids"]], np.int32))[0].tolist() == expected, parts


def test_an_unknown_part_of_a_word_is_not_masked_and_the_rest_of_the_word_is_masked_whole():
    tokenizer = tokenizer_of("Unigram")
    ids = tokenizer("aXb aXb", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁a", "<unk>", "b"] * 2
    collator = MaskingCollator(tokenizer, 0.5, mask_unit="word")
    labels = collator([{"input_ids": ids, "sample": number} for number in range(40)])["labels"] != IGNORE_INDEX
    assert not labels[:, [1, 4]].any()
    assert (labels[:, [0, 3]] == labels[:, [2, 5]]).all()
    assert {tuple(row) for row in labels[:, [0, 3]].tolist()} == {(a, b) for a in (False, True) for b in (False, True)}


@pytest.mark.parametrize("missing", [(0,), (8,), (0, 1), (7, 8), (3, 4, 5), (2, 6), tuple(range(1, 9)), ()])
def test_random_tokens_are_drawn_without_the_missing_ids(missing: tuple[int, ...]):
    rule = Masking(4, 9, (), 7, 1.0, 0.0, 1.0, missing_token_ids=missing)
    found, _ = rule.apply(np.zeros((20, 6), np.int32), np.arange(20))
    present = [token for token in range(9) if token not in missing]
    keys = [key_for(make_key(7, TRAINING), sample) for sample in range(20)]
    expected = [[present[(draw(key, 12 + i) >> 32) * len(present) >> 32] for i in range(6)] for key in keys]
    assert found.tolist() == expected


@pytest.mark.parametrize("special", [(), (0,), (3,), (0, 8), (7, 8)])
def test_all_tokens_but_the_special_ones_are_masked_at_a_rate_of_one(special: tuple[int, ...]):
    blocks = np.arange(10, dtype=np.int32)[None]
    ids, labels = Masking(4, 10, special, 7, 1.0, 1.0, 0.0).apply(blocks, np.array([0]))
    assert labels[0].tolist() == [IGNORE_INDEX if token in special else token for token in range(10)]
    assert ids[0].tolist() == [token if token in special else 4 for token in range(10)]
    assert (Masking(4, 10, special, 7, 0.0).apply(blocks, np.array([0]))[1] == IGNORE_INDEX).all()


def test_a_run_of_one_sample_has_the_first_rate_and_a_run_of_two_has_both():
    one, two = (Masking(4, 9, (), 7, 0.5, mlm_probability_end=0.25, total_samples=total) for total in (1, 2))
    assert one.rates(np.array([0])).tolist() == [0.5]
    assert two.rates(np.array([0, 1, 2])).tolist() == [0.5, 0.25, 0.25]
    assert Masking(4, 9, (), 7, 0.5).rates(np.array([0, 9])).tolist() == [0.5, 0.5]


def test_a_prepared_folder_says_which_tokens_are_special_and_which_are_missing():
    tokenizer = {"mask_token_id": 4, "vocab_size": 9, "special_token_ids": [0, 4]}
    for more, missing in (({}, ()), ({"missing_token_ids": [2, 3]}, (2, 3))):
        found = Masking.from_manifest({"tokenizer": tokenizer | more}, 7, 0.3, 0.5, 0.25, spans=True)
        assert found == Masking(4, 9, (0, 4), 7, 0.3, 0.5, 0.25, spans=True, missing_token_ids=missing)
    assert Masking.from_manifest({"tokenizer": tokenizer}, 7) == Masking(4, 9, (0, 4), 7)


@pytest.mark.parametrize("words", [1, 2, 9, 10, 11, 12])
def test_a_span_that_begins_up_to_nine_words_before_the_block_reaches_into_it(words: int):
    """Each span of up to 10 words is tried alone, at each place where it can begin."""
    starts, limits = np.ones((1, words), bool), np.arange(2 * MAX_SPAN, MAX_SPAN, -1, dtype=np.uint64)[None]
    for begin in range(words + MAX_SPAN - 1):
        for length in range(MAX_SPAN + 1):
            drawn = np.full((1, words + MAX_SPAN - 1), 10**6, np.uint64)
            drawn[0, begin] = 2 * MAX_SPAN - length  # below the limits of up to `length` - 1 more words
            covered, span = choose_spans(starts, drawn, limits)
            first = begin - (MAX_SPAN - 1)
            expected = [first <= word < first + length for word in range(words)]
            assert covered[0].tolist() == expected, (begin, length)
            assert (span[covered] == begin).all()


def test_a_span_covers_words_of_several_tokens_whole():
    starts = np.array([[True, False, True, True, False, False], [True] * 6])
    drawn = np.full((2, 6 + MAX_SPAN - 1), 10**6, np.uint64)
    drawn[:, MAX_SPAN] = 5  # at the second word: a span of 3 words
    limits = np.array([[9, 8, 6, 5, 4, 3, 2, 1, 1, 1]], np.uint64)
    covered, _ = choose_spans(starts, drawn, limits)
    assert covered.tolist() == [[False, False, True, True, True, True], [False, True, True, True, False, False]]


@pytest.mark.parametrize("rate", [0.001, 0.15, 0.5, 0.999])
def test_the_variance_of_spans_counts_the_words_that_are_masked_together(rate: float):
    begin = rate_of_beginnings(rate)

    def free(words: set[int]) -> float:
        """Return the probability that no span covers any of these words."""
        found = 1.0
        for first in range(-MAX_SPAN, max(words) + 1):
            nearest = min(word - first for word in words if word >= first)
            found *= 1 - begin * (LONGER[nearest] if nearest < MAX_SPAN else 0.0)
        return found

    assert free({0}) == pytest.approx(1 - rate, rel=1e-12)
    covariances = [free({0, distance}) - (1 - rate) ** 2 for distance in range(1, 2 * MAX_SPAN)]
    assert span_variance(rate) == pytest.approx(1 + 2 * sum(covariances) / (rate * (1 - rate)), rel=1e-6)
    assert span_variance(1.0) == 1.0


@settings(FEW, max_examples=15)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.sampled_from(["token", "word", "span"]))
@example(lengths=[1], unit="span")
@example(lengths=[7, 7], unit="word")
@example(lengths=[1, 30], unit="token")
def test_a_mask_depends_on_the_text_and_its_sample_and_not_on_the_batch(lengths: list[int], unit: str):
    tokenizer = tokenizer_of("WordPiece")
    rule = Rule(tokenizer, 7, 0.5, unit=unit)
    texts = [(np.arange(length) * 7 % len(tokenizer)).tolist() for length in lengths]
    collator = MaskingCollator(tokenizer, 0.5, mask_unit=unit, seed=7)
    batch = collator([{"input_ids": text, "sample": 5 * number} for number, text in enumerate(texts)])
    longest = max(lengths)
    for number, text in enumerate(texts):
        ids, labels = rule.mask(text, 5 * number)
        assert batch["input_ids"][number].tolist() == ids + [tokenizer.pad_token_id] * (longest - len(text))
        assert batch["labels"][number].tolist() == labels + [IGNORE_INDEX] * (longest - len(text))
    if len(set(lengths)) == 1:
        assert set(batch) == {"input_ids", "labels"}
    else:
        assert batch["attention_mask"].sum(1).tolist() == lengths
        assert batch["attention_mask"].dtype == torch.int64


def test_samples_without_numbers_get_them_from_the_random_state():
    tokenizer = tokenizer_of("WordPiece")
    collator, examples = MaskingCollator(tokenizer, 0.5), [{"input_ids": [5] * 40}, {"input_ids": [5] * 40}]
    torch.manual_seed(1)
    first, second = collator(examples)["labels"], collator(examples)["labels"]
    torch.manual_seed(1)
    again = collator([examples[0], {**examples[1], "sample": 0}])["labels"]  # ignored, as not all have one
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"mask_unit": "letter"}, "mask_unit"),
        ({"mlm_probability": 0.0}, "mlm_probability"),
        ({"mlm_probability": 1.0 + 1e-12}, "mlm_probability"),
        ({"mask_replace_prob": -1e-12}, "mask_/random_replace_prob"),
        ({"mask_replace_prob": 1.0 + 1e-12, "random_replace_prob": 0.0}, "mask_/random_replace_prob"),
        ({"random_replace_prob": -1e-12}, "mask_/random_replace_prob"),
        ({"mask_replace_prob": 0.9, "random_replace_prob": 0.11}, "mask_/random_replace_prob"),
    ],
    ids=str,
)
def test_probabilities_outside_their_range_are_refused(arguments: dict[str, Any], where: str):
    with pytest.raises(ConfigError, match=f"^{where}: must be "):
        MaskingCollator(tokenizer_of("WordPiece"), **arguments)


def test_probabilities_at_the_ends_of_their_range_are_accepted():
    tokenizer = tokenizer_of("WordPiece")
    for rate, mask, random in ((1e-300, 0.0, 0.0), (1.0, 1.0, 0.0), (0.5, 0.0, 1.0), (0.5, 0.9, 0.1), (0.5, 0.7, 0.3)):
        MaskingCollator(tokenizer, rate, mask, random)  # in binary, 1 - 0.9 < 0.1


def test_what_a_tokenizer_lacks_is_named():
    backend = Tokenizer(models.WordLevel({"a": 0, "<mask>": 1}))
    unpadded = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>")
    collator = MaskingCollator(unpadded, 1.0)
    assert collator([{"input_ids": [0, 0]}, {"input_ids": [0, 0]}])["labels"].tolist() == [[0, 0], [0, 0]]
    with pytest.raises(DataError, match="no padding token"):
        collator([{"input_ids": [0]}, {"input_ids": [0, 0]}])
    with pytest.raises(ConfigError, match="no mask token"):
        MaskingCollator(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(DataError, match="several documents are packed"):
        collator([{"input_ids": [0, 0], "segments": [0, 1]}])
