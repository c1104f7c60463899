"""Compare loops on a busy machine: turns in pairs, the median over pairs, its 95 % interval, and a verdict.

    for name in turns(["a", "b"], pairs=15):                # a b b a, 15 times
        seconds[name].append(one_turn(name))
    found = estimate(ratios(seconds["a"], seconds["b"]))    # found.median, found.interval, found.verdict()

In a pair every loop takes one turn, and then another in reverse order (A B B A; with three loops A B C C B A). A
loop's time in the pair is the sum of its two turns. Speed that drifts linearly within the pair changes all sums by
the same factor, which cancels in their ratio. A burst of other load changes the ratios of the pairs that it hits, in
favour of either loop; the median ignores them if they are fewer than half. The interval assumes independent pairs:
load that lasts for several pairs makes it too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from cloze.evaluation.intervals import median_interval

WIDEST = 0.05  # largest half width of an interval, relative to its median
CPU_TURN_SECONDS, GPU_TURN_SECONDS = 0.05, 0.5
GPU_STEPS = 5


def turns(names: Sequence[str], pairs: int) -> Iterator[str]:
    """Yield all of `names` in order and then in reverse order, `pairs` times."""
    for _ in range(pairs):
        yield from names
        yield from reversed(names)


def steps_in_turn(gpu: bool, seconds: float = math.inf) -> int:
    """Return the number of steps per turn if a step takes about `seconds`.

    On the CPU a turn takes at least one step and about 50 ms; on a GPU at least 5 steps and about half a second. The
    host queues work ahead of the GPU, except at both ends of a turn, where it waits: single steps would be slower.
    """
    return max(GPU_STEPS, round(GPU_TURN_SECONDS / seconds)) if gpu else max(1, round(CPU_TURN_SECONDS / seconds))


def sums(values: Sequence[float]) -> list[float]:
    """Return the sum of the two turns in each pair. `values`: one loop's turns, in the order of `turns`."""
    return [first + second for first, second in zip(values[::2], values[1::2], strict=True)]


def ratios(slow: Sequence[float], fast: Sequence[float], scale: float = 1.0) -> list[float]:
    """Return the ratio of `slow` to `fast` in each pair, times `scale`; both are the seconds of a loop's turns."""
    return [scale * one / other for one, other in zip(sums(slow), sums(fast), strict=True)]


@dataclass(frozen=True)
class Estimate:
    """The median of `values` and its 95 % interval, which is None for fewer than 6 values."""

    median: float
    interval: tuple[float, float] | None
    values: Sequence[float]

    def verdict(self, scale: float | None = None) -> str | None:
        """Return why the median should not be quoted; None if half the width of its interval is at most 5 % of `scale`
        (default: the median)."""
        if self.interval is None:
            return "too few for an interval, which needs 6"
        low, high = self.interval
        if (high - low) / 2 > WIDEST * (self.median if scale is None else scale):
            return "the spread is too large to quote this figure; run again on an idle machine"
        return None

    def as_json(self) -> dict[str, Any]:
        """Return the estimate with its verdict and all values."""
        return {"median": self.median, "interval_95": self.interval, "verdict": self.verdict(), "values": self.values}


def estimate(values: Sequence[float]) -> Estimate:
    """Return the median of one or more values, with its interval (see `median_interval`)."""
    return Estimate(median(values), median_interval(values), values)


def remark(what: str, found: Estimate, unit: str, of: str = "pairs", scale: float | None = None) -> list[str]:
    """Return a line with the reason why `what` should not be quoted; [] if it can be. `of`: the name of the values."""
    why = found.verdict(scale)
    around = " ({:.4g} to {:.4g})".format(*found.interval) if found.interval else ""
    return [f"{what}: {found.median:.4g} {unit}{around} over {len(found.values)} {of}: {why}"] if why else []
