"""From a position in the run to the batches of one optimizer step, read ahead by a thread.

    loader = TrainLoader(blocks, masking, layout, total_samples, start_step=120)
    for step in loader:                     # step 120, 121, ...
        step.num_masked                     # masked tokens of this rank
        for micro_batch in step.micro_batches:
            micro_batch["input_ids"], micro_batch["labels"]     # both [B, S] int64

Samples past the end of the run (the last step is rarely full) stay in the batch, so that shapes do not change, but
none of their tokens is predicted: they have no part in loss and gradient.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cloze.data.masking import IGNORE_INDEX, Masking
from cloze.data.sampler import block_indices, step_samples

PREFETCH_STEPS = 2


class BlockSource(Protocol):
    """What the loader needs of prepared blocks."""

    block_size: int

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.int32]: ...


@dataclass(frozen=True)
class Layout:
    """How a global batch is split: micro-steps of `per_device` blocks on each of `world_size` ranks."""

    per_device: int
    accumulation: int
    rank: int
    world_size: int

    @property
    def global_batch(self) -> int:
        """Blocks per optimizer step."""
        return self.per_device * self.accumulation * self.world_size


@dataclass(frozen=True)
class StepBatches:
    """One rank's share of one optimizer step."""

    global_step: int
    micro_batches: list[dict[str, torch.Tensor]]
    num_masked: int


def step_batches(
    blocks: BlockSource, masking: Masking, layout: Layout, total_samples: int, global_step: int
) -> StepBatches:
    """Build one rank's micro-batches of one step: a pure function of its arguments."""
    micro_batches = []
    for micro_step in range(layout.accumulation):
        samples = step_samples(
            global_step, micro_step, layout.per_device, layout.accumulation, layout.rank, layout.world_size
        )
        ids = blocks.read(block_indices(samples, len(blocks), masking.seed))
        input_ids, labels = masking.apply(ids, samples)
        labels[samples >= total_samples] = IGNORE_INDEX
        micro_batches.append({"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)})
    masked = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in micro_batches)
    return StepBatches(global_step, micro_batches, masked)


class TrainLoader:
    """Iterate over the steps `start_step` .. `end_step` - 1; a thread keeps the next ones ready."""

    def __init__(
        self,
        blocks: BlockSource,
        masking: Masking,
        layout: Layout,
        total_samples: int,
        start_step: int,
        end_step: int,
    ):
        self._build = lambda step: step_batches(blocks, masking, layout, total_samples, step)
        self._steps = range(start_step, end_step)
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=PREFETCH_STEPS)
        self._stop = threading.Event()

    def __iter__(self) -> Iterator[StepBatches]:
        thread = threading.Thread(target=self._fill, name="loader", daemon=True)
        thread.start()
        try:
            for _ in self._steps:
                item = self._ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._stop.set()

    def _fill(self) -> None:
        try:
            for step in self._steps:
                self._put(self._build(step))
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue


def eval_batches(
    blocks: BlockSource, masking: Masking, per_device: int, rank: int, world_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Every block once over all ranks, in order, each with its fixed mask; every rank gets equally many batches.

    Yields input_ids, labels [per_device, S] int64; a rank that runs out of blocks gets some without labels.
    """
    count = len(blocks)
    for step in range(-(-count // (per_device * world_size))):
        samples = step_samples(step, 0, per_device, 1, rank, world_size)
        input_ids, labels = masking.apply(blocks.read(np.minimum(samples, count - 1)), samples)
        labels[samples >= count] = IGNORE_INDEX
        yield {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
