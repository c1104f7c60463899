"""A global batch that grows: every sample once, in the same step, whatever the ranks; and without it, nothing new."""

from __future__ import annotations

import numpy as np
import pytest

from cloze.checkpoint.identity import check_same_run, run_identity
from cloze.config import TrainConfig
from cloze.config.relations import check_relations
from cloze.config.train import RUN_KEYS
from cloze.data.batches.batch_size_warmup import BatchSizes
from cloze.data.batches.layout import Layout
from cloze.data.batches.loader import BlockOrder, step_batches
from cloze.data.batches.masking import IGNORE_INDEX, Masking
from cloze.data.batches.sampler import block_indices, step_samples
from cloze.data.train_data import streamed_step
from cloze.errors import CheckpointError, ConfigError
from cloze.training.run_schedule import describe_wide_steps, fit_layout, plan_run

SIZES = [(1, 1, 0), (8, 1, 0), (8, 8, 5), (8, 1, 7), (24, 5, 3), (24, 3, 100), (7, 2, 1), (4096, 32, 2000)]
KEEP = Masking(4, 10**6, (0, 1, 2, 3, 4), seed=1, mlm_probability=1.0, mask_replace_prob=0.0, random_replace_prob=0.0)


def config(**more) -> TrainConfig:
    return TrainConfig(dataset_name="data", output_dir="out", model_type="roberta", **more)


class Numbered:
    """Blocks whose tokens say which block they are."""

    block_size, has_pieces = 4, False

    def __len__(self) -> int:
        return 10**5

    def read(self, indices: np.ndarray) -> np.ndarray:
        return np.repeat(indices[:, None] + 10, 4, axis=1).astype(np.int32)


@pytest.mark.parametrize(("full", "start", "steps"), SIZES)
def test_the_batch_grows_in_a_line_and_steps_follow_each_other(full: int, start: int, steps: int):
    sizes = BatchSizes(full, start, steps)
    each = [sizes.size(step) for step in range(steps + 20)]
    assert each[steps:] == [full] * 20
    assert all(abs(size - (start + (full - start) * step / steps)) < 1 for step, size in enumerate(each[:steps]))
    assert not steps or each[0] == start
    before = np.concatenate([[0], np.cumsum(each)]).tolist()
    assert [sizes.samples_before(step) for step in range(steps + 21)] == before
    for total in {0, 1, start, before[steps], before[steps] + 1, before[-1], *range(0, before[-1], max(1, full // 3))}:
        needed = sizes.steps_for(total)
        assert sizes.samples_before(needed) >= total
        assert needed == 0 or sizes.samples_before(needed - 1) < total


def test_a_step_of_the_full_size_takes_all_micro_steps():
    """Also if fewer would do; only a growing batch takes fewer."""
    fixed = Layout(per_device=2, accumulation=3, rank=0, world_size=1, size=2)
    growing = Layout(per_device=2, accumulation=3, rank=0, world_size=1, size=6, warmup_start=2, warmup_steps=2)
    assert [fixed.micro_steps(step) for step in range(3)] == [3, 3, 3]
    assert [growing.micro_steps(step) for step in range(3)] == [1, 2, 3]


def test_without_steps_of_growth_the_first_size_is_unused():
    assert [BatchSizes(full=8, start=9).size(step) for step in range(3)] == [8, 8, 8]


def test_a_run_of_any_length_is_a_matter_of_arithmetic():
    sizes = BatchSizes(full=10**6, start=1, warmup_steps=10**9)
    assert sizes.samples_before(10**9 + 7) - sizes.samples_before(10**9) == 7 * 10**6
    for step in (1, 12345, 10**9 - 1, 10**9):
        assert sizes.samples_before(step + 1) - sizes.samples_before(step) == sizes.size(step)


@pytest.mark.parametrize("wrong", [(8, 9, 3), (8, 0, 3), (0, 1, 0), (8, 1, -1)])
def test_what_does_not_grow_is_refused(wrong: tuple[int, int, int]):
    with pytest.raises(ValueError, match="no growth"):
        BatchSizes(*wrong)


# per device, accumulation, ranks, size: 24 places or, for the last two, a batch of 24 on more places
SPLITS = [(24, 1, 1, None), (3, 8, 1, None), (12, 1, 2, None), (2, 3, 4, None), (1, 6, 4, None), (3, 1, 8, None)]
SPLITS += [(5, 1, 5, 24), (2, 2, 7, 24)]


@pytest.mark.parametrize("growth", [(1, 0), (1, 7), (5, 3), (24, 4), (3, 50)])
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: "x".join(map(str, split)))
def test_every_step_takes_the_same_samples_however_it_is_split_and_no_forward_pass_in_vain(split, growth):
    per_device, accumulation, world_size, size = split
    layouts = [Layout(per_device, accumulation, rank, world_size, size, *growth) for rank in range(world_size)]
    sizes = BatchSizes(24, *growth)
    taken: list[int] = []
    for step in range(60):
        micro_steps = {layout.micro_steps(step) for layout in layouts}
        assert len(micro_steps) == 1  # ranks go through a step together
        count = micro_steps.pop()
        assert count == -(-sizes.size(step) // (per_device * world_size)) <= accumulation
        places = np.concatenate([layout.samples(step, micro) for micro in range(count) for layout in layouts])
        samples = places[places >= 0].tolist()
        assert sorted(samples) == list(range(sizes.samples_before(step), sizes.samples_before(step + 1)))
        taken += sorted(samples)
        for micro in range(count, accumulation):
            assert all((layout.samples(step, micro) == -1).all() for layout in layouts)
    assert taken == list(range(len(taken)))


@pytest.mark.parametrize("growth", [(1, 0), (3, 11)])
def test_batches_hold_the_blocks_of_their_samples(growth):
    for rank in range(2):
        layout = Layout(3, 4, rank, 2, None, *growth)
        order = BlockOrder(layout, 10**5, seed=1)
        for step in (0, 1, 2, 5, 10, 11, 12, 400, 3):
            batches = step_batches(Numbered(), KEEP, layout, 10**9, step, order).micro_batches
            assert len(batches) == layout.micro_steps(step)
            for micro, batch in enumerate(batches):
                samples = layout.samples(step, micro)
                here = samples >= 0
                rows = (batch["labels"] != IGNORE_INDEX).all(1).numpy()
                assert (rows == here).all()
                blocks = batch["input_ids"][:, 0].numpy() - 10
                assert (blocks[here] == block_indices(samples[here], 10**5, 1)).all()


def test_without_growth_steps_are_what_they_always_were():
    for rank in range(3):
        for layout, split in (
            (Layout(2, 3, rank, 3), (2, 3, rank, 3)),
            (Layout(2, 2, rank, 3, 8), (2, 2, rank, 3, 8)),
        ):
            for step in (0, 1, 17, 10**9):
                for micro in range(layout.accumulation):
                    assert (layout.samples(step, micro) == step_samples(step, micro, *split)).all()
                assert layout.micro_steps(step) == layout.accumulation


@pytest.mark.parametrize("max_steps", [-1, 3, 40])
def test_a_plan_counts_what_the_steps_take(max_steps: int):
    growing = config(
        batch_size_warmup_steps=10, batch_size_warmup_start=2, max_steps=max_steps, num_train_epochs=2.5,
        per_device_train_batch_size=8,
    )  # fmt: skip
    plan = plan_run(growing, fit_layout(growing, 0, 2, None), num_blocks=101, block_size=32)
    sizes = [BatchSizes(16, 2, 10).size(step) for step in range(plan.total_steps)]
    expected = round(2.5 * 101) if max_steps < 0 else sum(sizes)
    assert plan.total_samples == expected
    assert sum(sizes[:-1]) < expected <= sum(sizes)
    for step in range(plan.total_steps + 1):
        assert plan.position(step).samples_seen == min(sum(sizes[:step]), expected)
    assert plan.blocks_a_step == "2 growing to 16 blocks a step in 10 steps"
    still = config()
    assert plan_run(still, fit_layout(still, 0, 2, None), 101, 32).blocks_a_step == "16 blocks a step"


def test_epochs_are_samples_and_only_the_last_step_may_be_part_full():
    for epochs, blocks, samples, steps in ((3, 10, 30, 2), (3, 16, 48, 3), (3, 17, 51, 4), (0.29, 100, 29, 2)):
        values = config(num_train_epochs=epochs, per_device_train_batch_size=16)
        plan = plan_run(values, fit_layout(values, 0, 1, None), blocks, 32)
        assert (plan.total_samples, plan.total_steps) == (samples, steps)


def test_epochs_of_fewer_blocks_than_a_step_takes_are_announced():
    values = config(num_train_epochs=3, per_device_train_batch_size=64)
    layout = fit_layout(values, 0, 1, None)
    line = describe_wide_steps(values, plan_run(values, layout, 10, 32))
    assert line is not None
    assert line.startswith("a step takes 64 blocks and there are 10: 3 epochs are 1 step; ")
    assert describe_wide_steps(values, plan_run(values, layout, 64, 32)) is None
    given = config(max_steps=3, per_device_train_batch_size=64)
    assert describe_wide_steps(given, plan_run(given, layout, 10, 32)) is None


def test_a_length_beyond_64_bits_is_refused():
    values = config(max_steps=10**12, per_device_train_batch_size=2**24)
    with pytest.raises(ConfigError, match="cannot be counted"):
        plan_run(values, fit_layout(values, 0, 1, None), 100, 32)


def test_a_run_keeps_its_growth_on_other_ranks():
    growing = config(batch_size_warmup_steps=10, batch_size_warmup_start=2, per_device_train_batch_size=4)
    saved = {"run": {"global_batch_size": 8}, "world_size": 2,
             "config": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}}  # fmt: skip
    for world_size in (1, 2, 3, 8):
        layout = fit_layout(growing, 0, world_size, saved)
        assert layout.batch_sizes == BatchSizes(8, 2, 10)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 24])
def test_a_global_batch_that_is_given_is_split_whatever_the_number_of_ranks(world_size: int):
    layout = fit_layout(config(global_batch_size=24, per_device_train_batch_size=4), 0, world_size, None)
    assert layout.global_batch == 24
    assert layout.per_device <= 4
    assert layout.accumulation == -(-24 // (4 * world_size))  # no more passes than it takes
    saved = {"run": {"global_batch_size": 24}, "world_size": world_size,
             "config": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}}  # fmt: skip
    again = fit_layout(config(global_batch_size=24, per_device_train_batch_size=2), 0, world_size, saved)
    assert (again.global_batch, again.per_device <= 2) == (24, True)


def test_a_global_batch_that_cannot_be_is_refused():
    saved = {"run": {"global_batch_size": 24}, "world_size": 2, "config": {}}
    with pytest.raises(ConfigError, match="global batch of 24"):
        fit_layout(config(global_batch_size=32), 0, 2, saved)
    with pytest.raises(ConfigError, match="too few for 25 processes"):
        fit_layout(config(global_batch_size=24), 0, 25, None)
    for wrong in ({"global_batch_size": 0}, {"global_batch_size": 8, "gradient_accumulation_steps": 2}):
        with pytest.raises(ConfigError, match="global_batch_size"):
            check_relations(config(**wrong))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_refused_with_several_micro_batches_however_these_come_about(mode: str):
    for values in (
        {"gradient_accumulation_steps": 2},
        {"global_batch_size": 32, "per_device_train_batch_size": 8},
    ):
        with pytest.raises(ConfigError, match=r"--torch_compile_mode: .*CUDA graphs"):
            planned(config(torch_compile_mode=mode, **values))
        planned(config(torch_compile_mode="max-autotune-no-cudagraphs", **values))
        planned(config(torch_compile_mode=mode, torch_compile=False, **values))
    planned(config(torch_compile_mode=mode))


class Stream:
    """A stream that counts what is taken off it."""

    def __init__(self) -> None:
        self.taken = 0

    @property
    def position(self) -> dict[str, int]:
        return {"block": self.taken}

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.repeat(np.arange(self.taken, self.taken + count)[:, None] + 10, 4, axis=1).astype(np.int32)
        self.taken += count
        return ids, ids * 0


def test_no_block_of_a_stream_is_taken_for_a_place_that_holds_no_sample():
    for rank in range(2):
        layout, stream = Layout(3, 2, rank, 2, None, 1, 9), Stream()
        seen: list[int] = []
        for step in range(15):
            step_batch = streamed_step(stream, KEEP, layout, 10**6, 0, step)  # type: ignore[arg-type]
            for batch in step_batch.micro_batches:
                assert batch["input_ids"].shape == batch["segments"].shape == (3, 4)
                rows = (batch["labels"] != IGNORE_INDEX).all(1)
                seen += (batch["input_ids"][rows, 0] - 10).tolist()
            assert step_batch.stream == {"block": len(seen)}
        assert seen == list(range(len(seen)))


def planned(values: TrainConfig) -> None:
    check_relations(values)
    plan_run(values, fit_layout(values, 0, 1, None), 100, 32)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"batch_size_warmup_steps": -1}, "--batch_size_warmup_steps: must be at least 0"),
        ({"batch_size_warmup_steps": 5}, "--batch_size_warmup_steps and --batch_size_warmup_start: give both or none"),
        ({"batch_size_warmup_start": 5}, "give both or none"),
        ({"batch_size_warmup_steps": 5, "batch_size_warmup_start": 0}, "must be at least 1"),
        (
            {"batch_size_warmup_steps": 5, "batch_size_warmup_start": 9},
            "must not be above the 8 blocks of a full step",
        ),
        ({"mlm_probability_end": 0.0}, "--mlm_probability_end: must be above 0 and at most 1, not 0.0"),
        ({"mlm_probability_end": 1.1}, "must be above 0 and at most 1, not 1.1"),
    ],
    ids=str,
)
def test_growth_and_rates_that_cannot_be_are_refused_in_one_line(values, expected):
    with pytest.raises(ConfigError) as caught:
        planned(config(**values))
    assert expected in str(caught.value)


def test_a_checkpoint_from_before_a_flag_existed_belongs_to_runs_that_leave_the_flag_alone(tmp_path):
    younger = ("mlm_probability_end", "mask_unit", "batch_size_warmup_steps", "batch_size_warmup_start")
    assert set(younger) < set(RUN_KEYS)
    here = run_identity(config(), 8, {"checksum": "checksum"})
    saved = {key: value for key, value in here.items() if key not in younger}
    check_same_run(tmp_path, saved, here)
    for key, value in (("mask_unit", "word"), ("batch_size_warmup_steps", 3), ("mlm_probability_end", 0.1)):
        other = run_identity(config(**{key: value}), 8, {"checksum": "checksum"})
        with pytest.raises(CheckpointError, match=rf"another run \({key} \w+ -> {value}\)"):
            check_same_run(tmp_path, saved, other)
    with pytest.raises(CheckpointError, match="data None -> checksum"):
        check_same_run(tmp_path, {key: value for key, value in saved.items() if key != "data"}, here)


def test_a_refused_step_names_the_samples_it_took():
    from cloze.training.nonfinite import describe_step

    layout = Layout(4, 2, 0, 1, None, 2, 6)
    line = describe_step(layout, 3, [1.0, 1.0], float("nan"), scaled=False)
    assert line == "gradient norm is nan at step 4 (samples 9-13)"  # after steps of 2, 3 and 4
