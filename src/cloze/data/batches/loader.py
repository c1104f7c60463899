"""From a position in the run to the batches of one optimizer step, read ahead by a thread.

    build = partial(step_batches, blocks, masking, layout, total_samples)
    for step in TrainLoader(build, start_step=120, end_step=200):      # step 120, 121, ...
        step.num_masked                     # masked tokens of this rank
        for micro_batch in step.micro_batches:
            micro_batch["input_ids"], micro_batch["labels"]     # both [B, S] int64
            micro_batch["positions"], micro_batch["targets"]    # [K] int64: masked places of the batch, their tokens
        micro_batch.get("segments")     # [B, S] int32, where attention stays inside documents (best_fit packing)
        micro_batch.get("document_offsets")     # [D] int32, with segments: see `document_offsets`

Samples past the end of the run (the last step is rarely full) stay in the batch, so that shapes do not change, but
none of their tokens is predicted, so they do not affect loss and gradient. A step takes only the micro-batches that it
needs: while the batch grows, ceil(its blocks / (blocks per micro-batch * ranks)).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cloze.data.batches.layout import Layout
from cloze.data.batches.make_batch import count_masked, make_batch
from cloze.data.batches.masking import Masking
from cloze.data.batches.sampler import block_indices, step_samples

PREFETCH_STEPS = 2
_BLOCKS_AHEAD = 1024


class BlockSource(Protocol):
    """What the loader needs of prepared blocks."""

    block_size: int

    def __len__(self) -> int: ...

    has_pieces: bool

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.int32]: ...

    def read_segments(self, indices: NDArray[np.int64]) -> NDArray[np.int32]: ...


@dataclass(frozen=True)
class StepBatches:
    """One rank's share of one optimizer step. `stream`: of streamed data, the rank's place after it; `ready`: of
    batches that are being copied to a GPU, the event after which they are there."""

    global_step: int
    micro_batches: list[dict[str, torch.Tensor]]
    num_masked: int
    stream: dict[str, int] | None = None
    ready: torch.cuda.Event | None = None


class BlockOrder:
    """Which blocks a rank's micro-batches hold: a pure function of the step, worked out for many steps at once, since
    the permutation of a few numbers takes as long as that of a thousand."""

    def __init__(self, layout: Layout, num_blocks: int, seed: int):
        self._layout, self._num_blocks, self._seed = layout, num_blocks, seed
        self._steps = range(0)
        self._indices: NDArray[np.int64] = np.empty(0, np.int64)

    def blocks_of(self, global_step: int) -> NDArray[np.int64]:
        """Return the block numbers of one step: [accumulation, per_device]."""
        layout = self._layout
        if global_step not in self._steps:
            ahead = -(-_BLOCKS_AHEAD // (layout.per_device * layout.accumulation))
            self._steps = range(global_step, global_step + ahead)
            samples = [layout.samples(step, micro) for step in self._steps for micro in range(layout.accumulation)]
            found = block_indices(np.maximum(np.concatenate(samples), 0), self._num_blocks, self._seed)
            self._indices = found.reshape(ahead, layout.accumulation, layout.per_device)
        return self._indices[global_step - self._steps.start]


def step_batches(
    blocks: BlockSource,
    masking: Masking,
    layout: Layout,
    total_samples: int,
    global_step: int,
    order: BlockOrder | None = None,
    capacity: int = 0,
) -> StepBatches:
    """Build one rank's micro-batches of one step: a pure function of its arguments (`order` only saves time)."""
    order = order or BlockOrder(layout, len(blocks), masking.seed)
    micro_batches = []
    for micro_step, indices in enumerate(order.blocks_of(global_step)[: layout.micro_steps(global_step)]):
        samples = layout.samples(global_step, micro_step)
        segments = blocks.read_segments(indices) if blocks.has_pieces else None
        ids = blocks.read(indices)
        micro_batches.append(make_batch(ids, segments, masking, samples, total_samples, capacity))
    return StepBatches(global_step, micro_batches, count_masked(micro_batches))


class TrainLoader:
    """Iterate over the steps `start_step` .. `end_step` - 1; a thread keeps the next ones ready.

    `build`: global step -> StepBatches; it is called for one step after another.
    """

    def __init__(self, build: Callable[[int], StepBatches], start_step: int, end_step: int):
        self._build = build
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


def eval_batch_size(count: int, per_device: int, world_size: int) -> int:
    """Return the blocks per evaluation batch: `per_device`, but at most a rank's share of `count` blocks."""
    return min(per_device, max(1, -(-count // world_size)))


def eval_batches(
    blocks: BlockSource, masking: Masking, per_device: int, rank: int, world_size: int, draw: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield every block once over all ranks, in order, with its fixed mask; every rank gets the same number of
    batches.

    Yields input_ids, labels [`eval_batch_size`, S] int64; a rank that runs out of blocks gets blocks without labels.
    `draw`: which of its masks a block gets.
    """
    count = len(blocks)
    per_device = eval_batch_size(count, per_device, world_size)
    for step in range(-(-count // (per_device * world_size))):
        samples = step_samples(step, 0, per_device, 1, rank, world_size)
        indices = np.minimum(samples, count - 1)
        segments = blocks.read_segments(indices) if blocks.has_pieces else None
        masks = np.where(samples < count, samples + draw * count, -1)
        yield make_batch(blocks.read(indices), segments, masking, masks, count * (draw + 1))
