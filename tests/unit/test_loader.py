"""Every block exactly as often as asked, in training and evaluation, however the batches are cut."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from cloze.data.loader import BlockOrder, Layout, TrainLoader, eval_batches, step_batches
from cloze.data.masking import IGNORE_INDEX, Masking
from cloze.data.sampler import block_indices

MASKING = Masking(mask_token_id=4, vocab_size=200, special_token_ids=(0, 1, 2, 3, 4), seed=1, mlm_probability=1.0)
KEEP = Masking(4, 200, (0, 1, 2, 3, 4), seed=1, mlm_probability=1.0, mask_replace_prob=0.0, random_replace_prob=0.0)


class Numbered:
    """Blocks whose tokens say which block they are."""

    block_size = 4
    has_pieces = False

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, indices: np.ndarray) -> np.ndarray:
        return np.repeat(indices[:, None] + 10, 4, axis=1).astype(np.int32)


def seen(layout_of_rank, world_size: int, total: int, steps: int, count: int) -> np.ndarray:
    """How often each block was trained on (had labels)."""
    times = np.zeros(count, int)
    for rank in range(world_size):
        for step in range(steps):
            batches = step_batches(Numbered(count), KEEP, layout_of_rank(rank), total, step)
            for batch in batches.micro_batches:
                assert batch["input_ids"].shape == (layout_of_rank(rank).per_device, 4)
                rows = (batch["labels"] != IGNORE_INDEX).all(1)
                np.add.at(times, batch["input_ids"][rows, 0].numpy() - 10, 1)
            assert batches.num_masked == sum(int((b["labels"] != IGNORE_INDEX).sum()) for b in batches.micro_batches)
    return times


@pytest.mark.parametrize(("world_size", "per_device", "accumulation"), [(1, 1, 1), (1, 8, 1), (2, 3, 2), (3, 5, 1)])
def test_three_epochs_see_every_block_three_times(world_size: int, per_device: int, accumulation: int):
    count, epochs = 101, 3
    total = count * epochs
    steps = -(-total // (per_device * accumulation * world_size))
    times = seen(lambda rank: Layout(per_device, accumulation, rank, world_size), world_size, total, steps, count)
    assert (times == epochs).all()


@pytest.mark.parametrize(("world_size", "per_device"), [(1, 1), (1, 64), (2, 8), (3, 5), (4, 101)])
def test_evaluation_sees_every_block_once_with_the_same_mask(world_size: int, per_device: int):
    count = 101
    masks, lengths = {}, []
    for rank in range(world_size):
        batches = list(eval_batches(Numbered(count), MASKING.for_evaluation(), per_device, rank, world_size))
        lengths.append(len(batches))
        for batch in batches:
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                if (labels != IGNORE_INDEX).any():
                    block = int(labels[labels != IGNORE_INDEX][0]) - 10
                    assert block not in masks
                    masks[block] = ids.tolist()
    assert len(set(lengths)) == 1  # every rank calls the model equally often
    reference, _ = MASKING.for_evaluation().apply(Numbered(count).read(np.arange(count)), np.arange(count))
    assert masks == {block: ids.tolist() for block, ids in enumerate(reference)}


def test_reading_ahead_changes_nothing_and_hands_on_errors():
    layout = Layout(2, 2, 0, 1)
    ahead = list(TrainLoader(partial(step_batches, Numbered(50), MASKING, layout, 10**6), 7, 12))
    assert [batch.global_step for batch in ahead] == [7, 8, 9, 10, 11]
    for batch in ahead:
        direct = step_batches(Numbered(50), MASKING, layout, 10**6, batch.global_step)
        for one, other in zip(batch.micro_batches, direct.micro_batches, strict=True):
            assert (one["input_ids"] == other["input_ids"]).all()

    class Broken(Numbered):
        def read(self, indices: np.ndarray) -> np.ndarray:
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(TrainLoader(partial(step_batches, Broken(50), MASKING, layout, 10**6), 0, 5))


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize(("per_device", "accumulation"), [(1, 1), (7, 3), (64, 2), (2000, 1)])
def test_working_out_the_order_ahead_changes_nothing(world_size: int, per_device: int, accumulation: int):
    """Whatever step a run begins or goes on with, and in any order."""
    steps = [0, 1, 2, 1, 500, 501, 3, 10**9, 10**9 + 1, 700, 0]
    for rank in range(world_size):
        layout = Layout(per_device, accumulation, rank, world_size)
        order = BlockOrder(layout, 10**11, seed=9)
        for step in steps:
            expected = [block_indices(layout.samples(step, micro), 10**11, 9) for micro in range(accumulation)]
            assert (order.blocks_of(step) == np.stack(expected)).all()
