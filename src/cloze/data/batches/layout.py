"""Split a global batch into micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cloze.data.batches.batch_size_warmup import BatchSizes
from cloze.data.batches.sampler import step_samples


@dataclass(frozen=True)
class Layout:
    """The split of a global batch: micro-steps of `per_device` blocks on each of `world_size` ranks.

    `size`: blocks per optimizer step if they do not fill all positions (8 blocks on 3 ranks); positions left over are
    computed, but do not contribute to the loss. `warmup_start`, `warmup_steps`: see `BatchSizes`; a smaller batch
    takes only the micro-steps it needs.
    """

    per_device: int
    accumulation: int
    rank: int
    world_size: int
    size: int | None = None
    warmup_start: int = 1
    warmup_steps: int = 0

    @property
    def global_batch(self) -> int:
        """Return the blocks per optimizer step at full size."""
        return self.size or self.per_device * self.accumulation * self.world_size

    @cached_property
    def batch_sizes(self) -> BatchSizes:
        """Return the sizes and positions of all steps."""
        return BatchSizes(self.global_batch, self.warmup_start, self.warmup_steps)

    def micro_steps(self, global_step: int) -> int:
        """Return the number of micro-batches of a step, equal on all ranks."""
        if global_step >= self.warmup_steps:
            return self.accumulation
        return -(-self.batch_sizes.size(global_step) // (self.per_device * self.world_size))

    def samples(self, global_step: int, micro_step: int) -> NDArray[np.int64]:
        """Return the sample numbers of one micro-batch of this rank: [per_device] int64."""
        split = self.per_device, self.accumulation, self.rank, self.world_size
        sizes = self.batch_sizes
        return step_samples(
            global_step, micro_step, *split, sizes.size(global_step), sizes.samples_before(global_step)
        )
