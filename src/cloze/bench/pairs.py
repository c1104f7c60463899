"""Comparisons that hold on a busy machine: turns in pairs, the median over pairs, its interval, and a verdict.

    for name in turns(["a", "b"], pairs=15):                # a b b a, 15 times
        seconds[name].append(one_turn(name))
    found = estimate(ratios(seconds["a"], seconds["b"]))    # found.median, found.interval, found.verdict()

A pair is one turn of each loop and then one of each in reverse order (A B B A; of three loops A B C C B A). It
compares the sums of the loops' two turns. A speed that drifts linearly within the pair changes all sums by the same
factor, so it leaves their ratio as it is. A burst of other load changes the ratio of the pairs that it falls into, in
favour of either loop; the median ignores them as long as they are fewer than half. The interval takes pairs as
independent: load that lasts for several pairs makes it narrower than it should be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from cloze.evaluation.intervals import median_interval

WIDEST = 0.05  # of an interval, to either side, relative to the figure
CPU_TURN_SECONDS, GPU_TURN_SECONDS = 0.05, 0.5
GPU_STEPS = 5


def turns(names: Sequence[str], pairs: int) -> Iterator[str]:
    """Yield whose turn it is: all of `names` in order and in reverse order, `pairs` times."""
    for _ in range(pairs):
        yield from names
        yield from reversed(names)


def steps_in_turn(gpu: bool, seconds: float = math.inf) -> int:
    """Return how many steps a turn has if one takes about `seconds`.

    On the CPU one, or as many as take 50 ms. On a GPU as many as take half a second and at least 5: the host works
    ahead of the GPU, and the waits at both ends of a turn hide that, so a turn of one step would measure another loop.
    """
    return max(GPU_STEPS, round(GPU_TURN_SECONDS / seconds)) if gpu else max(1, round(CPU_TURN_SECONDS / seconds))


def sums(values: Sequence[float]) -> list[float]:
    """Return the sum of each pair's two turns, from one loop's turns in the order of `turns`."""
    return [first + second for first, second in zip(values[::2], values[1::2], strict=True)]


def ratios(slow: Sequence[float], fast: Sequence[float], scale: float = 1.0) -> list[float]:
    """Return of each pair how many times as long `slow` took as `fast`, from the seconds of their turns; times
    `scale`."""
    return [scale * one / other for one, other in zip(sums(slow), sums(fast), strict=True)]


@dataclass(frozen=True)
class Estimate:
    """The median of `values`, and its 95 % interval; None for fewer than 6 values, which have none."""

    median: float
    interval: tuple[float, float] | None
    values: Sequence[float]

    def verdict(self, scale: float | None = None) -> str | None:
        """Return why the median is no figure to quote; None if half of its interval is at most 5 % of `scale`
        (default: of the median)."""
        if self.interval is None:
            return "too few for an interval, which takes 6"
        low, high = self.interval
        if (high - low) / 2 > WIDEST * (self.median if scale is None else scale):
            return "the spread is too large for a figure; run again on an idle machine"
        return None

    def as_json(self) -> dict[str, Any]:
        """Return it with its verdict and all values."""
        return {"median": self.median, "interval_95": self.interval, "verdict": self.verdict(), "values": self.values}


def estimate(values: Sequence[float]) -> Estimate:
    """Return the median of one or more values, with its interval (see `median_interval`)."""
    return Estimate(median(values), median_interval(values), values)


def remark(what: str, found: Estimate, unit: str, of: str = "pairs", scale: float | None = None) -> list[str]:
    """Return the line that says why `what` is no figure to quote, or no line. `of`: of what the values are."""
    why = found.verdict(scale)
    around = " ({:.4g} to {:.4g})".format(*found.interval) if found.interval else ""
    return [f"{what}: {found.median:.4g} {unit}{around} over {len(found.values)} {of}: {why}"] if why else []
