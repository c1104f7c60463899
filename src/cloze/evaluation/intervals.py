"""Confidence intervals of values measured on a sample of blocks: ratios and paired differences of ratios.

A mean loss is a ratio of two sums over blocks, losses over masked tokens. Tokens of a block come from the same texts,
so the sample is one of blocks, not tokens; the standard error follows from the spread of block totals.

    center, error = ratio_and_error(losses, masked)       # both [blocks]
    low, high = interval(center, error)                   # 95 %
    p_value(difference, error)                            # two-sided
    median_interval(values)                               # 95 %, for any distribution
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054  # the 97.5th percentile of the standard normal distribution


def ratio_and_error(numerators: NDArray[np.float64], denominators: NDArray[np.float64]) -> tuple[float, float]:
    """Return sum(numerators) / sum(denominators) of blocks, [n] each, and its standard error; NaN if undefined.

    The error is that of a ratio estimator by linearization (Cochran, Sampling Techniques, 3rd edition, 1977, section
    6.4, without the finite population's correction), which is the cluster-robust "sandwich" of Liang and Zeger
    (Biometrika, 1986) with blocks as clusters: sqrt(n / (n - 1) * sum((L_b - R * N_b)^2)) / sum(N).
    """
    total, count = float(np.sum(denominators)), len(numerators)
    if total == 0:
        return math.nan, math.nan
    ratio = float(np.sum(numerators)) / total
    if count < 2:
        return ratio, math.nan
    scatter = float(np.sum((numerators - ratio * denominators) ** 2))
    return ratio, math.sqrt(count / (count - 1) * scatter) / total


def interval(center: float, error: float) -> tuple[float, float]:
    """Return the 95 % interval of a normal distribution around `center`."""
    return center - Z_95 * error, center + Z_95 * error


def p_value(difference: float, error: float) -> float:
    """Return the two-sided normal p-value of a difference: 1 for a difference of 0, NaN for an unknown error."""
    if math.isnan(error):
        return math.nan
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference) / error / math.sqrt(2))


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return a 95 % interval for the median of the distribution that `values` were independently drawn from; None for
    fewer than 6 values.

    Any distribution will do. The interval is from the k-th smallest to the k-th largest of n values, with the largest
    k for which 2 * P(B < k) <= 0.05, where B is the number of heads in n tosses of a fair coin (David and Nagaraja,
    Order Statistics, 3rd edition, 2003, section 7.1). So it contains the median with a probability of at least 95 %.
    For 5 values, k = 1 already gives 0.0625.
    """
    outside, k = 1, 0  # how many of the 2^n outcomes have at most k heads
    while 40 * outside <= 2 ** len(values):
        k += 1
        outside += math.comb(len(values), k)
    ordered = sorted(values)
    return (ordered[k - 1], ordered[-k]) if k else None
