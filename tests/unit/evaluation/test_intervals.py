"""Intervals that hold what they promise, and differences that are found in pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cloze.cli.commands.compare import verdict_of
from cloze.evaluation.intervals import interval, median_interval, p_value, ratio_and_error


def draw(generator: np.random.Generator, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses and masked tokens of blocks; the tokens of a block share how hard it is. The true mean is 3."""
    masked = generator.binomial(128, 0.15, blocks).astype(float)
    hardness = generator.gamma(9.0, 1 / 3, blocks)
    return masked * hardness + generator.normal(0, 1, blocks) * np.sqrt(masked), masked


def test_the_95_percent_interval_holds_the_truth_95_times_in_100():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        low, high = interval(*ratio_and_error(*draw(generator, 200)))
        held += low <= 3.0 <= high
    assert abs(held / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_the_error_is_that_of_a_bootstrap_over_blocks():
    generator = np.random.default_rng(1)
    losses, masked = draw(generator, 400)
    _, error = ratio_and_error(losses, masked)
    chosen = generator.integers(0, 400, (4000, 400))
    bootstrap = (losses[chosen].sum(1) / masked[chosen].sum(1)).std()
    assert error == pytest.approx(bootstrap, rel=0.05)
    # as if tokens were independent, it would be far too sure
    assert error > 1.5 * math.sqrt(np.sum((losses / masked - 3) ** 2) / 400) / math.sqrt(masked.sum())


def test_p_values_are_uniform_where_there_is_no_difference():
    generator = np.random.default_rng(2)
    values = []
    for _ in range(2000):
        masked = draw(generator, 200)[1]
        noise = generator.normal(0, 0.3, 200) * masked
        values.append(p_value(*ratio_and_error(noise, masked)))
    below = np.mean(np.array(values)[:, None] < np.array([0.05, 0.2, 0.5]), axis=0)
    assert np.abs(below - [0.05, 0.2, 0.5]).max() < 0.045


@pytest.mark.parametrize("size", range(61))
def test_the_interval_of_a_median_is_the_narrowest_one_with_95_percent_coverage(size: int):
    found = median_interval(range(1, size + 1))  # values are their own ranks
    if size < 6:
        assert found is None  # for 5 values even their whole range covers only 93.75 %
        return
    assert found is not None
    low, high = found
    assert low == size + 1 - high

    def coverage(low: float, high: float) -> float:  # outcomes with `low` to `high` - 1 values below it
        return sum(math.comb(size, count) for count in range(int(low), int(high))) / 2**size

    assert coverage(low, high) >= 0.95
    assert coverage(low + 1, high - 1) < 0.95


def test_the_interval_of_a_median_matches_published_tables():
    ranks = {6: 1, 9: 2, 12: 3, 15: 4, 17: 5, 20: 6, 23: 7, 25: 8}  # of the two-sided sign test at 5 %
    assert {size: median_interval(range(1, size + 1))[0] for size in ranks} == ranks  # type: ignore[index]


def test_the_interval_of_a_median_holds_for_any_distribution():
    generator = np.random.default_rng(3)
    for draws in (generator.exponential(1.0, (2000, 15)), generator.standard_cauchy((2000, 15))):
        truth = math.log(2) if draws.min() > 0 else 0.0
        intervals = [median_interval(list(draw)) for draw in draws]
        held = np.mean([found is not None and found[0] <= truth <= found[1] for found in intervals])
        assert abs(held - 0.9648) < 4 * math.sqrt(0.9648 * 0.0352 / 2000)


def test_errors_and_intervals_of_few_blocks_match_results_computed_by_hand():
    two = ratio_and_error(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    assert two == (2.0, 1.0)  # sqrt(2 / 1 * (1 + 1)) / 2
    assert ratio_and_error(np.array([1.0, 3.0, 0.0]), np.array([1.0, 3.0, 0.0])) == (1.0, 0.0)
    ratio, error = ratio_and_error(np.array([6.0, 2.0, 1.0]), np.array([2.0, 2.0, 2.0]))
    assert (ratio, error) == (1.5, pytest.approx(math.sqrt(3 / 2 * (9 + 1 + 4)) / 6, rel=1e-15))
    assert ratio_and_error(np.array([4.0]), np.array([2.0]))[0] == 2.0
    low, high = interval(2.0, 0.5)
    assert (low, high) == (pytest.approx(1.020018007729973), pytest.approx(2.979981992270027))


def test_p_values_match_the_normal_distribution():
    assert p_value(1.959963984540054, 1.0) == pytest.approx(0.05, rel=1e-12)
    assert p_value(-1.959963984540054 / 4, 0.25) == pytest.approx(0.05, rel=1e-12)
    assert p_value(0.0, 1.0) == 1.0
    assert p_value(2.5758293035489004, 1.0) == pytest.approx(0.01, rel=1e-12)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_error_of_equal_blocks_is_that_of_a_mean_and_scales_with_the_losses(count: int):
    """With one masked token per block, the error is the standard error of the mean loss."""
    losses = np.random.default_rng(count).gamma(2.0, 1.0, count)
    ratio, error = ratio_and_error(losses, np.ones(count))
    assert ratio == pytest.approx(losses.mean(), rel=1e-12)
    assert error == pytest.approx(losses.std(ddof=1) / math.sqrt(count), rel=1e-12)
    assert ratio_and_error(3 * losses, np.full(count, 2.0)) == pytest.approx((1.5 * ratio, 1.5 * error), rel=1e-12)


def test_nothing_to_tell():
    assert all(math.isnan(value) for value in ratio_and_error(np.zeros(3), np.zeros(3)))
    assert math.isnan(ratio_and_error(np.ones(1), np.ones(1))[1])
    assert p_value(0.0, 0.0) == 1.0
    assert p_value(0.1, 0.0) == 0.0
    assert math.isnan(p_value(0.1, math.nan))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.5, 0.4, 0.6), "a is better"),
        ((-0.5, -0.6, -0.4), "b is better"),
        ((0.1, -0.1, 0.3), "no significant difference"),
        ((math.nan, math.nan, math.nan), "no verdict"),
        ((0.5, math.nan, math.nan), "no verdict"),
    ],
)
def test_a_difference_that_is_not_finite_has_no_winner(values: tuple[float, float, float], expected: str):
    assert verdict_of(*values).startswith(expected)
