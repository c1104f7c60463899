"""How many blocks each step takes, and where in the data it begins, while the batch is still growing.

Early in training a step of a small batch is as effective as one of a large batch and costs less (McCandlish et al.,
"An Empirical Model of Large-Batch Training", 2018); GPT-3 grew its batch linearly (Brown et al., 2020, section 2.3).

    sizes = BatchSizes(full=256, start=32, warmup_steps=100)
    sizes.size(0), sizes.size(50), sizes.size(100)      # 32, 144, 256
    sizes.samples_before(100)                           # number of the first sample of step 100

It is stateless integer arithmetic, independent of the number of ranks.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class BatchSizes:
    """Blocks per global step: start + floor((full - start) * step / warmup_steps), and `full` from step `warmup_steps`
    on. Raises ValueError unless 1 <= start <= full."""

    full: int
    start: int = 1
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        highest = self.full if self.warmup_steps else self.start
        if self.warmup_steps < 0 or self.full < 1 or not 1 <= self.start <= highest:
            raise ValueError(f"no growth from {self.start} to {self.full} blocks in {self.warmup_steps} steps")

    def size(self, step: int) -> int:
        """Return blocks of a step (0-based)."""
        if step >= self.warmup_steps:
            return self.full
        return self.start + (self.full - self.start) * step // self.warmup_steps

    def samples_before(self, step: int) -> int:
        """Return blocks of all steps before this one: the number of its first sample."""
        if step > self.warmup_steps:
            return self._samples_of_warmup + (step - self.warmup_steps) * self.full
        return step * self.start + _floor_sum(step, self.warmup_steps, self.full - self.start) if step else 0

    def steps_for(self, total_samples: int) -> int:
        """Return the number of steps for `total_samples` samples; the last one may be partly filled."""
        if total_samples > self._samples_of_warmup:
            return self.warmup_steps + -(-(total_samples - self._samples_of_warmup) // self.full)
        return bisect_left(range(self.warmup_steps + 1), total_samples, key=self.samples_before)

    @cached_property
    def _samples_of_warmup(self) -> int:
        return self.samples_before(self.warmup_steps)


def _floor_sum(count: int, divisor: int, factor: int) -> int:
    """Return the sum of `factor * i // divisor` for i in [0, count), in O(log) steps: the lattice points under a line,
    counted from one side and then from the other, as in Euclid's algorithm (Graham, Knuth, Patashnik, "Concrete
    Mathematics", section 3.5)."""
    total, offset = 0, 0
    while True:
        total += count * (count - 1) // 2 * (factor // divisor) + count * (offset // divisor)
        factor, offset = factor % divisor, offset % divisor
        top = factor * count + offset
        if top < divisor:
            return total
        count, offset = divmod(top, divisor)
        divisor, factor = factor, divisor
