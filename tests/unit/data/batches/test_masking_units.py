"""Rates that change, whole words and spans: the statistics that were asked for, and a function of (seed, sample)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cloze.config import TrainConfig
from cloze.data.batches.counter_rng import draws, keys_for, make_key
from cloze.data.batches.make_batch import fixed_capacity
from cloze.data.batches.masking import IGNORE_INDEX, LONGER, MAX_SPAN, Masking, choose_spans, span_rate, span_variance
from cloze.data.batches.word_boundaries import LETTER, Edges, words_of_edges
from cloze.data.train_data import masking_rule
from cloze.training.run_schedule import fit_layout, plan_run
from cloze.training.setup import head_capacity

VOCABULARY, SPECIAL = 1000, (0, 1, 2, 3, 4)
_LETTERS = np.full(VOCABULARY, LETTER, np.uint8)
_BEGINS = (np.arange(VOCABULARY) % 2 == 0) | (np.arange(VOCABULARY) < 5)  # even tokens begin a word
_ENDS = np.arange(VOCABULARY) < 5
WORDS = words_of_edges(Edges(_BEGINS, _ENDS, _LETTERS, _LETTERS, np.zeros(VOCABULARY, bool)))
TOKEN = Masking(mask_token_id=4, vocab_size=VOCABULARY, special_token_ids=SPECIAL, seed=7)
WORD, SPAN = replace(TOKEN, words=WORDS), replace(TOKEN, words=WORDS, spans=True)
UNITS = {"token": TOKEN, "word": WORD, "span": SPAN}
RATES = [0.02, 0.15, 0.4, 0.8]


@pytest.fixture(scope="module")
def blocks() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (4000, 128)).astype(np.int32)


def ordinary(blocks: np.ndarray) -> np.ndarray:
    return ~np.isin(blocks, SPECIAL)


def word_numbers(blocks: np.ndarray) -> np.ndarray:
    return np.cumsum(WORDS.starts(blocks), axis=1) - 1


def masked_of(rule: Masking, blocks: np.ndarray, first: int = 0) -> np.ndarray:
    return rule.apply(blocks, np.arange(first, first + len(blocks)))[1] != IGNORE_INDEX


def word_lengths(blocks: np.ndarray) -> np.ndarray:
    """Tokens that can be masked of each word: [B, words], 0 where there are no more words."""
    number = word_numbers(blocks)
    lengths = np.zeros((len(blocks), number.max() + 1))
    np.add.at(lengths, (np.arange(len(blocks))[:, None], number), ordinary(blocks))
    return lengths


def variance_of_counts(blocks: np.ndarray, unit: str, rate: float) -> np.ndarray:
    """The variance of each block's number of masked tokens: [B]. Of words: p (1 - p) times the sum of the squares of
    their lengths. Of spans, two words at a distance d are also both in one: see `span_variance`."""
    lengths = word_lengths(blocks) if unit != "token" else ordinary(blocks).astype(float)
    total = rate * (1 - rate) * (lengths**2).sum(axis=1)
    if unit == "span":
        q, free = span_rate(np.array([rate]))[0], 1.0
        for distance, longer in enumerate(LONGER[:-1], start=1):
            free *= 1 - q * longer
            both = (lengths[:, distance:] * lengths[:, :-distance]).sum(axis=1)
            total += 2 * (1 - rate) * (free - (1 - rate)) * both
    return total


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("unit", UNITS)
def test_every_token_is_masked_at_the_rate_asked_for_and_with_the_variance_that_follows(blocks, unit, rate):
    masked = masked_of(replace(UNITS[unit], mlm_probability=rate), blocks)
    expected, variance = rate * ordinary(blocks).sum(axis=1), variance_of_counts(blocks, unit, rate)
    deviations = (masked.sum(axis=1) - expected) / np.sqrt(variance)
    assert abs(deviations.mean()) < 4 / len(blocks) ** 0.5
    assert abs((masked.sum() - expected.sum()) / np.sqrt(variance.sum())) < 4
    # The variance found in n nearly normal numbers has a standard deviation of sqrt(2 / n) and a little more.
    assert abs((deviations**2).mean() - 1) < 5 * (2 / len(blocks)) ** 0.5
    # The beginning and the end of a block are masked as often as its middle.
    for part in (slice(0, 3), slice(-3, None)):
        here = variance_of_counts(blocks[:, part], unit, rate).sum()
        assert abs((masked[:, part].sum() - rate * ordinary(blocks[:, part]).sum()) / here**0.5) < 4


@pytest.mark.parametrize("unit", ["word", "span"])
def test_words_are_masked_whole_and_special_tokens_never(blocks, unit):
    masked, number = masked_of(UNITS[unit], blocks), word_numbers(blocks)
    assert not masked[~ordinary(blocks)].any()
    inside = (number[:, 1:] == number[:, :-1]) & ordinary(blocks)[:, 1:] & ordinary(blocks)[:, :-1]
    assert inside.mean() > 0.3
    assert (masked[:, 1:] == masked[:, :-1])[inside].all()
    assert (masked[:, 1:] != masked[:, :-1])[~inside].any()


def test_spans_have_the_lengths_of_the_paper():
    """Geometric(0.2), cut at 10 words: a mean of 3.8, as section 3.1 of SpanBERT says. Rare ones do not overlap."""
    assert sum(LONGER) == pytest.approx(3.8, abs=0.01)
    starts = np.ones((4000, 512), bool)
    keys = keys_for(make_key(1), np.arange(4000))
    rate = 0.001
    limits = (rate * np.array([LONGER]) * 2.0**64).astype(np.uint64)
    covered, span = choose_spans(starts, draws(keys, 0, 512 + MAX_SPAN - 1), limits)
    inside = np.flatnonzero(covered & (np.arange(512) < 500))
    _, lengths = np.unique(inside // 512 * 10**6 + span.reshape(-1)[inside], return_counts=True)
    expected = -np.diff([*LONGER, 0.0])
    counts = np.bincount(lengths, minlength=MAX_SPAN + 1)[1:]
    assert len(counts) == MAX_SPAN
    assert counts.sum() > 1500
    z = (counts - expected * counts.sum()) / np.sqrt(expected * counts.sum())
    assert (z**2).sum() < 9 + 5 * 18**0.5  # chi square of 9 degrees of freedom; some spans are cut by the end


@pytest.mark.parametrize("unit", UNITS)
def test_what_becomes_of_masked_tokens_is_drawn_for_each_token_and_of_spans_for_each_span(blocks, unit):
    rule = UNITS[unit]
    ids, labels = rule.apply(blocks, np.arange(len(blocks)))
    chosen = labels != IGNORE_INDEX
    m = chosen.sum() / (1 if unit == "token" else 25)  # so many independent draws at least
    assert abs((ids == 4)[chosen].mean() - 0.8) < 5 * (0.16 / m) ** 0.5
    assert abs((ids == blocks)[chosen].mean() - 0.1) < 5 * (0.09 / m) ** 0.5
    assert (ids[~chosen] == blocks[~chosen]).all()
    neighbours = chosen[:, 1:] & chosen[:, :-1]
    if unit == "word":
        neighbours &= word_numbers(blocks)[:, 1:] == word_numbers(blocks)[:, :-1]
    alike = ((ids == 4)[:, 1:] == (ids == 4)[:, :-1])[neighbours].mean()
    alone = 0.8**2 + 0.2**2
    if unit == "span":  # neighbours are mostly of one span
        assert alike > 0.9
    else:
        assert abs(alike - alone) < 5 * (alone * (1 - alone) / neighbours.sum()) ** 0.5


def test_within_a_span_all_tokens_are_masked_or_random_or_kept(blocks):
    ids, labels = replace(SPAN, mlm_probability=0.003).apply(blocks, np.arange(len(blocks)))  # no two are neighbours
    chosen = labels != IGNORE_INDEX
    what = np.where(ids == 4, 1, np.where(ids == blocks, 2, 3))
    both = chosen[:, 1:] & chosen[:, :-1]
    assert both.sum() > 500
    differ = (what[:, 1:] != what[:, :-1])[both].mean()
    assert differ < 0.01
    random = chosen & (what == 3)
    assert random.sum() > 50
    assert len(np.unique(ids[random])) > 40  # the tokens of a span are drawn one by one


def test_spans_that_overlap_are_told_apart_in_one_way():
    """Spans of words 2-6, 4-5 and 5-8: the one that ends last has the word; a span inside another is not seen."""
    drawn = np.full((1, 14 + MAX_SPAN - 1), 2**64 - 1, np.uint64)
    limits = (np.array([LONGER]) * 2.0**63).astype(np.uint64)
    for begin, length in ((2, 5), (4, 2), (5, 4)):
        drawn[0, begin + MAX_SPAN - 1] = limits[0, length - 1] - np.uint64(1)
    covered, span = choose_spans(np.ones((1, 14), bool), drawn, limits)
    assert np.flatnonzero(covered[0]).tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert (span[0, 2:9] - (MAX_SPAN - 1)).tolist() == [2, 2, 2, 5, 5, 5, 5]
    drawn[0, 3] = limits[0, MAX_SPAN - 1] - np.uint64(1)  # six words before the block, ten words long
    covered, _ = choose_spans(np.ones((1, 14), bool), drawn, limits)
    assert np.flatnonzero(covered[0]).tolist() == list(range(9))


def test_a_word_whose_draw_is_the_limit_begins_no_span():
    limits = np.array([[8] + [0] * (MAX_SPAN - 1)], np.uint64)
    drawn = np.full((1, 3 + MAX_SPAN - 1), 2**64 - 1, np.uint64)
    drawn[0, MAX_SPAN - 1 :] = 8, 7, 9
    covered, _ = choose_spans(np.ones((1, 3), bool), drawn, limits)
    assert covered.tolist() == [[False, True, False]]


@pytest.mark.parametrize("shape", [(0, 14), (1, 0), (0, 0)])
def test_without_tokens_there_are_no_spans(shape: tuple[int, int]):
    drawn = np.zeros((shape[0], shape[1] + MAX_SPAN - 1), np.uint64)
    covered, span = choose_spans(np.ones(shape, bool), drawn, np.ones((1, MAX_SPAN), np.uint64))
    assert covered.shape == span.shape == shape


@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.15, 0.5, 0.9, 0.999, 1.0])
def test_the_rate_of_spans_gives_exactly_the_share_asked_for(rate):
    q = float(span_rate(np.array([rate]))[0])
    assert 0 < q <= 1
    assert 1 - np.prod([1 - q * longer for longer in LONGER]) == pytest.approx(rate, rel=1e-9)
    together = span_rate(np.array([0.3, rate, 0.7]))
    assert together[1] == q  # to the bit: other rows have no say


@pytest.mark.parametrize("end", [None, 0.4])
@pytest.mark.parametrize("unit", UNITS)
def test_masks_do_not_depend_on_how_samples_are_put_into_batches(blocks, unit, end):
    rule = replace(UNITS[unit], mlm_probability_end=end, total_samples=10**9)
    samples = np.arange(600) * 10**6
    ids, labels = rule.apply(blocks[:600], samples)
    for part in np.array_split(np.random.default_rng(1).permutation(600), 7):
        ids_part, labels_part = rule.apply(blocks[part], samples[part])
        assert (ids_part == ids[part]).all()
        assert (labels_part == labels[part]).all()
    one, other = (masked_of(UNITS[unit], blocks[:2000], first) for first in (0, 2000))  # another pass
    assert abs(np.corrcoef(one.sum(axis=1), other.sum(axis=1))[0, 1]) < 0.2
    assert abs((one & other)[ordinary(blocks[:2000])].mean() - 0.15**2) < 0.005


@pytest.mark.parametrize("unit", UNITS)
def test_the_rate_goes_in_a_line_from_the_first_sample_to_the_last(blocks, unit):
    rule = replace(UNITS[unit], mlm_probability=0.4, mlm_probability_end=0.1, total_samples=4000)
    assert rule.rates(np.array([0, 3999, 1333, 10**6])).tolist() == pytest.approx([0.4, 0.1, 0.3, 0.1])
    shares = masked_of(rule, blocks).sum(axis=1) / ordinary(blocks).sum(axis=1)
    for tenth in range(10):
        here = slice(400 * tenth, 400 * (tenth + 1))
        rate = 0.4 - 0.3 * (400 * tenth + 199.5) / 3999
        sigma = variance_of_counts(blocks[here], unit, rate).sum() ** 0.5 / ordinary(blocks[here]).sum()
        assert abs(shares[here].mean() - rate) < 4.5 * sigma
    assert replace(rule, total_samples=1).rates(np.array([0])).tolist() == [0.4]


@pytest.mark.parametrize("unit", UNITS)
def test_a_rate_that_ends_as_it_began_is_the_fixed_one_to_the_bit(blocks, unit):
    rule = UNITS[unit]
    fixed = rule.apply(blocks[:500], np.arange(500))
    line = replace(rule, mlm_probability_end=0.15, total_samples=400).apply(blocks[:500], np.arange(500))
    assert (fixed[0] == line[0]).all()
    assert (fixed[1] == line[1]).all()


@pytest.mark.parametrize("unit", UNITS)
def test_evaluation_masks_single_tokens_at_the_last_rate(blocks, unit):
    plain = TOKEN.for_evaluation().apply(blocks, np.arange(len(blocks)))
    assert (UNITS[unit].for_evaluation().apply(blocks, np.arange(len(blocks)))[0] == plain[0]).all()
    line = replace(UNITS[unit], mlm_probability=0.4, mlm_probability_end=0.15, total_samples=9).for_evaluation()
    assert (line.apply(blocks, np.arange(len(blocks)))[0] == plain[0]).all()


@pytest.mark.parametrize("unit", ["word", "span"])
def test_the_masks_of_words_and_spans_are_the_ones_of_every_earlier_version(unit):
    """Changed masks would silently break every run that is resumed: these values must never change."""
    ids, labels = UNITS[unit].apply(np.arange(5, 133, dtype=np.int32)[None], np.array([12345]))
    assert np.flatnonzero(labels[0] != IGNORE_INDEX).tolist() == MASKED_OF_SAMPLE_12345[unit]
    assert int(ids.sum()) == SUM_OF_SAMPLE_12345[unit]


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.5])
@pytest.mark.parametrize("unit", UNITS)
def test_a_fixed_shape_has_room_for_nearly_every_micro_batch(blocks, unit, rate):
    masked = masked_of(replace(UNITS[unit], mlm_probability=rate), blocks).sum(axis=1)
    for rows in (1, 8):
        most = masked.reshape(-1, rows).sum(axis=1).max()
        assert most <= fixed_capacity(rows * 128, rate, unit) <= rows * 128
    assert fixed_capacity(10**6, rate, unit) < 1.15 * rate * 10**6


@pytest.mark.parametrize("unit", UNITS)
def test_a_runs_flags_make_its_masks(unit):
    """The rate ends with the run's last sample, and a fixed shape has room for the larger rate."""
    flags = {"mlm_probability": 0.1, "mlm_probability_end": 0.5, "mask_unit": unit, "seed": 7}
    config = TrainConfig(dataset_name="data", output_dir="out", model_type="bert", max_steps=50, **flags)
    plan = plan_run(config, fit_layout(config, 0, 2, None), num_blocks=10, block_size=128)
    tokenizer = {"mask_token_id": 4, "vocab_size": VOCABULARY, "special_token_ids": SPECIAL}
    words = None if unit == "token" else WORDS
    rule = masking_rule(config, {"tokenizer": tokenizer}, plan.total_samples, words)
    assert rule == replace(UNITS[unit], mlm_probability=0.1, mlm_probability_end=0.5, total_samples=50 * 16)
    assert rule.rates(np.array([0, 50 * 16 - 1])).tolist() == [0.1, 0.5]
    gpu = SimpleNamespace(device=torch.device("cuda"))
    falling = replace(config, mlm_probability=0.5, mlm_probability_end=0.1)
    for one in (config, falling, replace(falling, mlm_probability_end=None)):
        assert head_capacity(plan, one, gpu) == fixed_capacity(8 * 128, 0.5, unit)


def test_the_variance_of_spans_is_the_one_of_the_formula():
    """Against words simulated in one long row, all of one token."""
    starts, count = np.ones((400, 1000), bool), 1000
    keys = keys_for(make_key(5), np.arange(400))
    for rate in (0.15, 0.5):
        limits = (span_rate(np.array([rate]))[:, None] * np.array(LONGER) * 2.0**64).astype(np.uint64)
        covered, _ = choose_spans(starts, draws(keys, 0, count + MAX_SPAN - 1), limits)
        found = covered.sum(axis=1).var() / (count * rate * (1 - rate))
        assert abs(found / span_variance(rate) - 1) < 5 * (2 / 400) ** 0.5
    assert span_variance(1.0) == 1.0


MASKED_OF_SAMPLE_12345 = {
    "word": [0, 5, 6, 15, 16, 19, 20, 23, 24, 29, 30, 45, 46, 49, 50, 57, 58, 59, 60, 119, 120, 127],
    "span": [
        7,
        8,
        9,
        10,
        11,
        12,
        13,
        14,
        15,
        16,
        17,
        18,
        19,
        20,
        37,
        38,
        77,
        78,
        79,
        80,
        121,
        122,
        123,
        124,
        125,
        126,
        127,
    ],
}
SUM_OF_SAMPLE_12345 = {"word": 8769, "span": 7295}
