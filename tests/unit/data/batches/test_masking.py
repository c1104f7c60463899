"""Masks: BERT's statistics, and a function of (seed, sample) alone."""

import inspect
from dataclasses import fields, replace

import numpy as np
import pytest

from cloze.config import TrainConfig
from cloze.data.batches.collator import MaskingCollator
from cloze.data.batches.masking import IGNORE_INDEX, Masking

MASKING = Masking(mask_token_id=4, vocab_size=1000, special_token_ids=(0, 1, 2, 3, 4), seed=7)


@pytest.fixture(scope="module")
def blocks():
    return np.random.default_rng(0).integers(0, 1000, (2000, 128)).astype(np.int32)


def test_a_mask_depends_on_seed_and_sample_only(blocks):
    samples = np.arange(2000) * 10**8
    ids, labels = MASKING.apply(blocks, samples)
    order = np.random.default_rng(1).permutation(2000)
    for part in np.array_split(order, 7):
        ids_part, labels_part = MASKING.apply(blocks[part], samples[part])
        assert (ids_part == ids[part]).all()
        assert (labels_part == labels[part]).all()


@pytest.mark.parametrize("probability", [0.15, 0.3, 0.5])
def test_the_shares_are_the_ones_asked_for(blocks, probability):
    ids, labels = replace(MASKING, mlm_probability=probability).apply(blocks, np.arange(2000))
    chosen = labels != IGNORE_INDEX
    ordinary = ~np.isin(blocks, MASKING.special_token_ids)
    n = ordinary.sum()
    assert abs(chosen.sum() / n - probability) < 5 * (probability * (1 - probability) / n) ** 0.5
    m = chosen.sum()
    masked, kept = (ids == 4)[chosen].mean(), (ids == blocks)[chosen].mean()
    assert abs(masked - (0.8 + 0.1 / 1000)) < 5 * (0.16 / m) ** 0.5
    assert abs(kept - (0.1 + 0.1 / 1000)) < 5 * (0.09 / m) ** 0.5


def test_special_tokens_are_never_predicted_and_others_never_changed_unless_chosen(blocks):
    ids, labels = MASKING.apply(blocks, np.arange(2000))
    chosen = labels != IGNORE_INDEX
    assert not chosen[np.isin(blocks, MASKING.special_token_ids)].any()
    assert (labels[chosen] == blocks[chosen]).all()
    assert (ids[~chosen] == blocks[~chosen]).all()


def test_random_tokens_are_uniform_over_the_vocabulary(blocks):
    rule = replace(MASKING, mlm_probability=1.0, mask_replace_prob=0.0, random_replace_prob=1.0)
    ids, _ = rule.apply(blocks, np.arange(2000))
    drawn = ids[~np.isin(blocks, MASKING.special_token_ids)]
    counts = np.bincount(drawn, minlength=1000)
    expected = len(drawn) / 1000
    assert len(counts) == 1000
    assert ((counts - expected) ** 2 / expected).sum() < 999 + 5 * (2 * 999) ** 0.5


def test_positions_of_masks_are_independent(blocks):
    _, labels = MASKING.apply(blocks, np.arange(2000))
    chosen = (labels != IGNORE_INDEX).astype(float)
    centred = chosen - chosen.mean()
    for lag in (1, 2, 3, 64, 127):
        correlation = (centred[:, lag:] * centred[:, :-lag]).mean() / centred.var()
        assert abs(correlation) < 0.02 if lag < 127 else abs(correlation) < 0.12


def test_seeds_passes_and_evaluation_draw_other_masks(blocks):
    _, base = MASKING.apply(blocks, np.arange(2000))
    others = [
        replace(MASKING, seed=8).apply(blocks, np.arange(2000)),
        replace(MASKING, evaluation=True).apply(blocks, np.arange(2000)),
        MASKING.apply(blocks, np.arange(2000, 4000)),
    ]
    for _, labels in others:
        both = ((base != IGNORE_INDEX) & (labels != IGNORE_INDEX)).mean()
        assert abs(both - 0.15**2) < 0.005


def test_the_masks_are_the_ones_of_every_earlier_version():
    """Changed masks would silently break every run that is resumed: these values must never change."""
    _, labels = MASKING.apply(np.arange(5, 133, dtype=np.int32)[None], np.array([12345]))
    assert np.flatnonzero(labels[0] != IGNORE_INDEX).tolist() == MASKED_OF_SAMPLE_12345


MASKED_OF_SAMPLE_12345 = [0, 5, 10, 15, 18, 19, 23, 29, 34, 45, 49, 57, 59, 86, 108, 119, 127]


@pytest.mark.parametrize("made", [Masking, Masking.from_manifest, MaskingCollator])
def test_the_defaults_of_python_are_those_of_the_command_line(made):
    ours = {name: one.default for name, one in inspect.signature(made).parameters.items()}
    theirs = {field.name: field.default for field in fields(TrainConfig)}
    shared = {name for name in ours.keys() & theirs.keys() if ours[name] is not inspect.Parameter.empty}
    assert {"mlm_probability", "mask_replace_prob", "random_replace_prob"} <= shared
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
