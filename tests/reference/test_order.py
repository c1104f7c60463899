"""Samples, steps and batches match the reference in boundary cases: powers of two, one block, empty ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from cloze.config import TrainConfig
from cloze.data.batches import loader
from cloze.data.batches.batch_size_warmup import BatchSizes
from cloze.data.batches.counter_rng import make_key
from cloze.data.batches.layout import Layout
from cloze.data.batches.loader import BlockOrder, TrainLoader, eval_batches, step_batches
from cloze.data.batches.make_batch import count_masked, document_offsets, fixed_capacity, make_batch
from cloze.data.batches.masking import IGNORE_INDEX, Masking
from cloze.data.batches.sampler import block_indices, permute, step_samples
from cloze.training.run_schedule import Plan, fit_layout, plan_run, split_batch
from reference.order import batch_size, block_of, samples_of, samples_of_rank

FEW = settings(max_examples=15, deadline=None, derandomize=True, database=None)
SEED, FIRST_TOKEN = 5, 10
ALL = Masking(4, 10**6, (0, 1, 2, 3, 4), SEED, mlm_probability=1.0, mask_replace_prob=0.0, random_replace_prob=0.0)
AROUND_POWERS = sorted({2**k + more for k in range(1, 42) for more in (-1, 0, 1)} | {10**11})


@pytest.fixture(autouse=True, scope="module")
def few_blocks_ahead() -> Iterator[None]:
    """Compute the order of a few blocks at a time, which is faster here; test_loader.py uses the default number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "_BLOCKS_AHEAD", 8)
        yield


class Numbered:
    """Blocks whose tokens are the number of the block, plus 10."""

    has_pieces = False

    def __init__(self, count: int, block_size: int = 1):
        self.count, self.block_size = count, block_size

    def __len__(self) -> int:
        return self.count

    def read(self, indices: np.ndarray) -> np.ndarray:
        return np.repeat(indices[:, None] + FIRST_TOKEN, self.block_size, axis=1).astype(np.int32)


def test_every_size_up_to_300_is_permuted_without_gaps():
    for size in range(1, 301):
        samples = np.arange(3 * size, 4 * size)
        assert np.array_equal(np.sort(block_indices(samples, size, SEED)), np.arange(size)), size


def test_samples_match_the_blocks_of_the_reference_for_small_sizes_and_around_powers_of_two():
    for size in [*range(1, 301), *AROUND_POWERS]:
        samples = [epoch * size + place for epoch in (0, 7) for place in sorted({0, size - 1})]
        found = block_indices(np.array(samples, np.int64), size, SEED)
        assert found.tolist() == [block_of(sample, size, SEED) for sample in samples], size


@pytest.mark.parametrize("size", [1, 4, 5, 16, 17])
def test_only_positions_below_the_size_have_an_image(size: int):
    assert permute(np.array([], np.int64), size, make_key(0)).tolist() == []
    assert len(permute(np.array([0, size - 1]), size, make_key(0))) == 2
    for wrong in (-1, size):
        with pytest.raises(ValueError, match=rf"positions must be in \[0, {size}\)"):
            permute(np.array([0, wrong]), size, make_key(0))


def test_a_step_has_at_least_one_sample_and_at_most_one_per_place():
    for size in range(1, 7):
        places = [step_samples(2, micro, 2, 3, 0, 1, size).tolist() for micro in range(3)]
        assert [place for micro in places for place in micro] == [*range(2 * size, 3 * size), *[-1] * (6 - size)]
    for wrong in (0, 7):
        with pytest.raises(ValueError, match=f"{wrong} samples do not fit into 6 places"):
            step_samples(0, 0, 2, 3, 0, 1, wrong)


@st.composite
def runs(draw: Any) -> dict[str, Any]:
    """Draw the numbers that decide which rank sees which block at which step."""
    full = draw(st.integers(1, 12))
    warmup_steps = draw(st.sampled_from([0, 1, 2, 5]))
    return {
        "num_blocks": draw(st.integers(1, 20)),
        "full": full,
        "world_size": draw(st.integers(1, min(full, 5))),
        "per_device": draw(st.integers(1, 5)),
        "growth": (draw(st.integers(1, full)) if warmup_steps else 1, warmup_steps),
        "epochs": draw(st.sampled_from([0.29, 0.5, 1.0, 1.5, 2.0, 3.0])),
    }


def plan_of(rank: int, num_blocks: int, full: int, world_size: int, per_device: int, growth, epochs: float) -> Plan:
    values = {"global_batch_size": full, "per_device_train_batch_size": per_device, "num_train_epochs": epochs}
    if growth[1]:
        values |= {"batch_size_warmup_start": growth[0], "batch_size_warmup_steps": growth[1]}
    config = TrainConfig(output_dir="", **values)
    return plan_run(config, fit_layout(config, rank, world_size, None), num_blocks, block_size=1)


def blocks_of(batch: dict[str, Any]) -> list[int]:
    """Return the numbers of the blocks in a batch that have labels."""
    rows = (batch["labels"] != IGNORE_INDEX).all(1)
    return (batch["labels"][rows, 0] - FIRST_TOKEN).tolist()


@FEW
@given(runs())
@example({"num_blocks": 3, "full": 12, "world_size": 5, "per_device": 4, "growth": (1, 0), "epochs": 1.0})
@example({"num_blocks": 1, "full": 12, "world_size": 3, "per_device": 2, "growth": (1, 2), "epochs": 3.0})
@example({"num_blocks": 1, "full": 1, "world_size": 1, "per_device": 1, "growth": (1, 0), "epochs": 1.0})
@example({"num_blocks": 100, "full": 7, "world_size": 3, "per_device": 1, "growth": (1, 0), "epochs": 0.29})
@example({"num_blocks": 17, "full": 8, "world_size": 3, "per_device": 8, "growth": (8, 1), "epochs": 1.0})
def test_every_rank_predicts_the_blocks_of_the_reference_to_the_end_of_the_last_epoch(run: dict[str, Any]):
    total = round(run["epochs"] * run["num_blocks"])
    assume(total)
    seen: list[list[int]] = []
    for rank in range(run["world_size"]):
        plan = plan_of(rank, **run)
        layout, blocks = plan.layout, Numbered(run["num_blocks"])
        build = partial(step_batches, blocks, ALL, layout, total, order=BlockOrder(layout, len(blocks), SEED))
        for step, found in enumerate(TrainLoader(build, 0, plan.total_steps)):
            samples = samples_of(step, run["full"], *run["growth"])
            split = samples_of_rank(samples, rank, run["world_size"], layout.per_device)
            expected = [[block_of(s, len(blocks), SEED) for s in micro if s < total] for micro in split]
            assert [blocks_of(batch) for batch in found.micro_batches] == expected
            assert found.num_masked == sum(map(len, expected))
            assert {batch["input_ids"].shape for batch in found.micro_batches} == {(layout.per_device, 1)}
            seen += expected
            if step in (1, plan.total_steps - 1):  # resume there
                again = next(iter(TrainLoader(partial(step_batches, blocks, ALL, layout, total), step, step + 1)))
                assert [blocks_of(batch) for batch in again.micro_batches] == expected
        sizes = [batch_size(step, run["full"], *run["growth"]) for step in range(plan.total_steps)]
        assert sum(sizes[:-1]) < total == plan.total_samples <= sum(sizes)
        assert plan.position(plan.total_steps).samples_seen == total
        seen_after = [min(sum(sizes[:step]), total) // run["num_blocks"] for step in range(plan.total_steps + 1)]
        ends = [step for step in range(1, len(seen_after)) if seen_after[step] > seen_after[step - 1]]
        assert [step for step in range(1, len(seen_after)) if plan.is_due("epoch", None, step)] == ends
    times = np.bincount([block for micro in seen for block in micro], minlength=run["num_blocks"])
    assert set(times) <= {int(run["epochs"]), -int(-run["epochs"] // 1)}, "an epoch saw a block twice"
    assert times.sum() == total


def test_a_batch_is_split_into_as_few_passes_as_possible_and_none_is_empty():
    for size, most in product(range(1, 25), range(1, 7)):
        for world_size in range(1, size + 1):
            layout = split_batch(Layout(1, 1, 0, world_size), size, most)
            assert layout.global_batch == size
            assert layout.per_device <= most
            assert layout.accumulation == layout.micro_steps(0) == -(-size // (most * world_size))
            width = layout.per_device * world_size
            assert (layout.accumulation - 1) * width < size <= layout.accumulation * width


def test_hundredths_of_an_epoch_are_exact_numbers_of_blocks():
    for hundredths in range(1, 301):
        values = TrainConfig(output_dir="", num_train_epochs=hundredths / 100, per_device_train_batch_size=1)
        assert plan_run(values, fit_layout(values, 0, 1, None), 100, 32).total_steps == hundredths


@FEW
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9))
@example(full=1, start=1, warmup=0)
@example(full=9, start=1, warmup=1)
@example(full=9, start=9, warmup=9)
def test_a_growing_batch_counts_the_samples_of_all_earlier_steps(full: int, start: int, warmup: int):
    assume(start <= full)
    sizes, seen = BatchSizes(full, start if warmup else 1, warmup), 0
    for step in range(2 * warmup + 3):
        assert sizes.samples_before(step) == seen
        assert sizes.size(step) == batch_size(step, full, start, warmup)
        assert sizes.steps_for(seen) == step
        assert sizes.steps_for(seen + 1) == step + 1
        seen += batch_size(step, full, start, warmup)


@FEW
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2))
@example(count=1, world_size=3, per_device=8, draw=1)
@example(count=10, world_size=2, per_device=8, draw=0)
@example(count=9, world_size=2, per_device=2, draw=2)
def test_evaluation_gives_each_rank_its_blocks_with_their_masks(
    count: int, world_size: int, per_device: int, draw: int
):
    blocks, masking = Numbered(count, 3), Masking(4, 99, (0, 4), SEED, mlm_probability=0.8).for_evaluation()
    ids, labels = masking.apply(blocks.read(np.arange(count)), np.arange(count) + draw * count)
    size = min(per_device, -(-count // world_size))
    turns = range(-(-count // (size * world_size)))
    for rank in range(world_size):
        found = list(eval_batches(blocks, masking, per_device, rank, world_size, draw))
        assert len(found) == len(turns)
        for turn, batch in zip(turns, found, strict=True):
            first = (turn * world_size + rank) * size
            here = list(range(first, min(first + size, count)))
            assert batch["labels"].shape == (size, 3)
            assert (batch["labels"][: len(here)].numpy() == labels[here]).all()
            assert (batch["input_ids"][: len(here)].numpy() == ids[here]).all()
            assert (batch["labels"][len(here) :] == IGNORE_INDEX).all()


@pytest.mark.parametrize("capacity", [0, 8, 9, 12])
@pytest.mark.parametrize("masked", [0, 1, 7, 8, 9, 16, 17, 20])
def test_masked_positions_are_padded_to_a_multiple_of_8_and_to_the_capacity(masked: int, capacity: int):
    tokens = np.full(20, 4, np.int32)
    tokens[20 - masked :] = np.arange(masked) + 30
    batch = make_batch(tokens.reshape(2, 10), None, ALL, np.array([0, 1]), 2, capacity)
    size = max(8, -(-masked // 8) * 8, capacity)
    assert batch["positions"].tolist() == [*range(20 - masked, 20), *[0] * (size - masked)]
    assert batch["targets"].tolist() == [*range(30, 30 + masked), *[IGNORE_INDEX] * (size - masked)]
    assert count_masked([batch, batch]) == 2 * masked
    assert set(batch) == {"input_ids", "labels", "positions", "targets"}


def test_rows_without_a_sample_and_samples_past_the_end_predict_nothing():
    samples = np.array([0, -1, 6, 7, 8])
    labels = make_batch(Numbered(9, 2).read(np.arange(5)), None, ALL, samples, 7)["labels"]
    assert [(row != IGNORE_INDEX).all().item() for row in labels] == [True, False, True, False, False]
    assert (labels[[1, 3, 4]] == IGNORE_INDEX).all()


@FEW
@given(st.integers(1, 3), st.lists(st.integers(1, 40), min_size=1, max_size=40))
@example(batch=2, lengths=[1] * 32)  # more documents than the initial room
@example(batch=1, lengths=[1, 1])
@example(batch=1, lengths=[16, 16])  # just enough room
@example(batch=1, lengths=[16, 15, 1])
@example(batch=3, lengths=[15])
def test_documents_begin_where_their_segments_change(batch: int, lengths: list[int]):
    row = np.repeat(np.arange(len(lengths)), lengths)
    size, begins = len(row), np.cumsum(lengths) - lengths
    expected = [begin + number * size for number in range(batch) for begin in begins]
    room = batch * max(1, size // 16)
    while room < len(expected):
        room *= 2
    found = document_offsets(np.stack([row] * batch).astype(np.int32))
    assert found.tolist() == expected + [batch * size] * (room + 1 - len(expected))
    assert found.dtype == np.int32


def test_a_fixed_shape_has_room_for_six_standard_deviations_in_multiples_of_64():
    assert fixed_capacity(4096, 0.5) == 2048 + 6 * 32  # already a multiple of 64
    assert fixed_capacity(4098, 0.5) == 2240 + 64
    assert fixed_capacity(4096, 0.5, "word") == 2432  # 2048 + 6 * 32 * sqrt(3) = 2380.6
    assert fixed_capacity(100, 0.5) == 100
    for tokens in (1, 63, 64, 65):
        assert fixed_capacity(tokens, 1.0) == fixed_capacity(tokens, 1.0, "span") == tokens


def test_a_batch_is_the_product_of_its_parts_unless_its_size_is_given():
    assert Layout(2, 3, 0, 4).global_batch == 24
    assert Layout(2, 3, 0, 4, 23).global_batch == 23
    growing = Layout(2, 3, 0, 2, None, 1, 4)
    assert [growing.micro_steps(step) for step in range(6)] == [1, 1, 2, 3, 3, 3]  # 1, 3, 6, 9 and 12 blocks
