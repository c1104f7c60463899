"""Steps that are read ahead equal those that are built one by one; see also tests/reference/test_order.py."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from cloze.data.batches.layout import Layout
from cloze.data.batches.loader import BlockOrder, TrainLoader, step_batches
from cloze.data.batches.masking import Masking
from cloze.data.batches.sampler import block_indices

MASKING = Masking(mask_token_id=4, vocab_size=200, special_token_ids=(0, 1, 2, 3, 4), seed=1, mlm_probability=1.0)


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
