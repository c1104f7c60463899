"""A thousand GPUs and 10^12 tokens, without processes: what is arithmetic is exact and quick there too.

4,096 ranks and 10^11 blocks are simulated; what the figures mean is in docs/scaling.md.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cloze.checkpoint import format as checkpoint_files
from cloze.checkpoint.format import read_manifest, write_manifest
from cloze.config import TrainConfig
from cloze.data.batches.batch_size_warmup import BatchSizes
from cloze.data.batches.counter_rng import make_key
from cloze.data.batches.layout import Layout
from cloze.data.batches.loader import BlockOrder
from cloze.data.batches.masking import Masking
from cloze.data.batches.sampler import block_indices, permute
from cloze.data.prepared import blocks as blocks_module
from cloze.data.prepared.blocks import Blocks, find_rows
from cloze.data.prepared.packing import Packed
from cloze.data.prepared.shards import ShardWriter
from cloze.training.run_schedule import plan_run

RANKS, BLOCKS, PER_DEVICE = 4096, 10**11, 4
GLOBAL_BATCH = RANKS * PER_DEVICE
STEPS_AN_EPOCH = BLOCKS // GLOBAL_BATCH  # and a part of one more: an epoch ends within a step
# First, middle and last of an epoch, across its end, at step 10^7, and after a hundred epochs.
STEPS = [
    0,
    1,
    STEPS_AN_EPOCH // 2,
    STEPS_AN_EPOCH - 1,
    STEPS_AN_EPOCH,
    STEPS_AN_EPOCH + 1,
    10**7,
    100 * STEPS_AN_EPOCH,
]


def samples_of_step(step: int, world_size: int, per_device: int, accumulation: int, growth=(1, 0)) -> np.ndarray:
    """What all ranks together take in one step, rank by rank."""
    layouts = [Layout(per_device, accumulation, rank, world_size, GLOBAL_BATCH, *growth) for rank in range(world_size)]
    (micro_steps,) = {layout.micro_steps(step) for layout in layouts}
    taken = [layout.samples(step, micro) for layout in layouts for micro in range(micro_steps)]
    samples = np.concatenate(taken)
    return samples[samples >= 0]


@pytest.mark.parametrize("step", STEPS)
def test_4096_ranks_take_each_sample_of_a_step_once_and_the_same_as_1_or_3_ranks(step: int):
    everyone = samples_of_step(step, RANKS, PER_DEVICE, 1)
    expected = np.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
    assert np.array_equal(np.sort(everyone), expected)
    for world_size, per_device, accumulation in ((1, 4096, 4), (3, 64, 86), (1000, 8, 3)):
        assert np.array_equal(np.sort(samples_of_step(step, world_size, per_device, accumulation)), expected)


def test_a_batch_that_grows_is_shared_out_exactly_too():
    growth = (100, 10**6)
    sizes = BatchSizes(GLOBAL_BATCH, *growth)
    for step in (0, 1, 999_999, 10**6, 10**7):
        first = sizes.samples_before(step)
        expected = np.arange(first, first + sizes.size(step))
        for split in ((RANKS, PER_DEVICE, 1), (3, 64, 86)):
            assert np.array_equal(np.sort(samples_of_step(step, *split, growth)), expected)


def test_across_the_end_of_an_epoch_the_next_order_begins_and_no_block_comes_twice_before():
    samples = samples_of_step(STEPS_AN_EPOCH, RANKS, PER_DEVICE, 1)
    old, new = samples[samples < BLOCKS], samples[samples >= BLOCKS]
    assert len(old) > 0
    assert len(new) > 0
    found = block_indices(samples, BLOCKS, seed=1)
    assert np.array_equal(found[samples < BLOCKS], block_indices(old, BLOCKS, seed=1))
    assert len(np.unique(found[samples < BLOCKS])) == len(old)
    assert len(np.unique(found[samples >= BLOCKS])) == len(new)
    assert not np.array_equal(block_indices(new - BLOCKS, BLOCKS, seed=1), found[samples >= BLOCKS])


def test_each_rank_works_out_its_own_blocks_and_no_others():
    """A rank's `BlockOrder` looks at its own samples only; together they have the blocks of the step, each once."""
    step = STEPS_AN_EPOCH // 2
    expected = block_indices(np.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH), BLOCKS, seed=1)
    for rank in (0, 1, 2047, 4095):
        order = BlockOrder(Layout(PER_DEVICE, 1, rank, RANKS), BLOCKS, seed=1)
        assert np.array_equal(order.blocks_of(step)[0], expected[rank * PER_DEVICE : (rank + 1) * PER_DEVICE])
    assert len(np.unique(expected)) == GLOBAL_BATCH


@pytest.mark.parametrize(
    ("size", "count"),
    [(10**11, 10**6), *((size, 10**5) for size in (2**31, 2**32 + 1, 10**12 + 39, 2**62, 2**63 - 1))],
)
def test_the_order_is_one_to_one_and_in_range_up_to_the_largest_64_bit_number(size: int, count: int):
    """A million places, half of them next to each other and at the ends, have a million blocks."""
    quarter = count // 4
    near = np.concatenate([np.arange(quarter), np.arange(size - quarter, size)])
    far = np.random.default_rng(0).integers(quarter, size - quarter, count)
    places = np.concatenate([near, np.unique(far)[: 2 * quarter]])
    assert len(places) == count
    found = permute(places, size, make_key(1))
    assert found.min() >= 0
    assert size - size // 1000 < found.max() < size
    assert len(np.unique(found)) == count


def test_masks_depend_on_the_sample_and_on_nothing_else():
    """Samples beyond 2^32 and 2^53, alone or among others, at whatever row: the same tokens are masked."""
    masking = Masking(4, 50_265, (0, 1, 2, 3, 4), seed=1, mlm_probability_end=0.3, total_samples=10**12)
    samples = np.array([0, 1, 2**31, 2**32, 2**32 + 1, 10**11 - 1, 10**11, 10**12 - 1, 2**53 + 1, 2**53 + 2, 2**62])
    blocks = np.random.default_rng(0).integers(5, 50_265, (len(samples), 128)).astype(np.int32)
    inputs, labels = masking.apply(blocks, samples)
    assert len({row.tobytes() for row in labels != -100}) == len(samples)
    for rows in ([3], [10, 0], [8, 9, 1], range(len(samples))):
        some = list(rows)
        again_inputs, again_labels = masking.apply(blocks[some], samples[some])
        assert np.array_equal(again_inputs, inputs[some])
        assert np.array_equal(again_labels, labels[some])


def test_a_block_is_found_among_200_000_shards_in_microseconds():
    sizes = np.random.default_rng(0).integers(0, 10**6, 200_000)  # some are empty
    sizes[[0, 7, 199_999]] = 0
    ends = np.cumsum(sizes)
    begins = ends - sizes
    held = np.flatnonzero(sizes)
    for edge, row in ((begins[held], 0), (ends[held] - 1, sizes[held] - 1)):
        shards, rows = find_rows(ends, edge)
        assert np.array_equal(shards, held)
        assert np.array_equal(rows, np.broadcast_to(row, held.shape))
    wanted = np.random.default_rng(1).integers(0, ends[-1], 100_000)
    begin = time.perf_counter()
    shards, rows = find_rows(ends, wanted)
    assert (time.perf_counter() - begin) / len(wanted) < 20e-6
    assert np.array_equal(begins[shards] + rows, wanted)
    assert (rows < sizes[shards]).all()


def test_no_more_shards_are_mapped_than_the_machine_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The ones mapped first are let go, and are there again when they are asked for."""
    files = []
    for number in range(12):
        writer = ShardWriter(tmp_path / f"{number}.arrow", 4)
        rows = np.full((3, 4), number, np.int32)
        writer.add(Packed(rows, np.zeros(3, np.int64), np.empty(0, np.int64)))
        writer.close()
        files.append((tmp_path / f"{number}.arrow", 3))

    def mapped() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum(str(tmp_path) in line for line in lines)

    monkeypatch.setattr(blocks_module, "MOST_MAPPED", 5)
    blocks = Blocks(files, 4)
    for _ in range(3):
        for number in np.random.default_rng(0).permutation(36):
            assert (blocks.read(np.array([number])) == number // 3).all()
            assert mapped() <= 5
    assert (blocks.read(np.arange(36))[:, 0] == np.arange(36) // 3).all()
    assert mapped() == 5


def test_the_place_of_a_run_at_step_ten_million_is_exact():
    config = TrainConfig(dataset_name="data", output_dir="out", max_steps=2 * 10**7)
    plan = plan_run(config, Layout(PER_DEVICE, 1, 5, RANKS), BLOCKS, 512)
    position = plan.position(10**7)
    assert (position.samples_seen, position.tokens_seen) == (10**7 * 16_384, 10**7 * 16_384 * 512)
    assert plan.epoch(10**7) == pytest.approx(1.6384, abs=1e-12)
    begin = time.perf_counter()
    BlockOrder(plan.layout, BLOCKS, seed=1).blocks_of(10**7)
    assert time.perf_counter() - begin < 0.1  # a seek, not a replay
    growing = BatchSizes(16_384, 32, 10**6)
    assert growing.samples_before(10**7) == growing.samples_before(10**6) + 9 * 10**6 * 16_384


def test_a_manifest_of_many_pieces_is_compact_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    piece = {"name": "embeddings.weight", "key": "exp_avg", "file": "rank-00000.safetensors", "sum": -(2**62)}
    manifest = {"format_version": 2, "pieces": [{**piece, "offset": n, "length": 1} for n in range(50)]}
    manifest |= {
        "position": {"global_step": 1, "samples_seen": 1, "tokens_seen": 1},
        "optimizer": {"class": "AdamW", "groups": []},
        "parameters": {"embeddings.weight": {"shape": [50], "trained": True, "scalars": {}}},
        "tied": {},
        "run": {},
        "config": {},
        "precision": "no",
        "files": {"rank-00000.safetensors": {"bytes": 400, "sha256": "0" * 64}},
    }
    sizes = []
    for number, most in enumerate((50, 49)):
        monkeypatch.setattr(checkpoint_files, "MOST_READABLE_PIECES", most)
        folder = tmp_path / str(number)
        folder.mkdir()
        write_manifest(folder, manifest)
        assert read_manifest(folder) == manifest
        sizes.append((folder / "checkpoint.json").stat().st_size)
    assert sizes[1] < 0.85 * sizes[0]
    assert json.loads((tmp_path / "0" / "checkpoint.json").read_text()) == json.loads(
        (tmp_path / "1" / "checkpoint.json").read_text()
    )


def test_a_process_asks_for_as_many_sockets_as_there_are_ranks():
    """Machines give 1,024 to a process that does not ask, too few for connections to 1,023 others."""
    script = (
        "import resource\nfrom cloze.utils.system import allow_open_files\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        "allow_open_files(1000)\nprint(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "allow_open_files(10)\nprint(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "allow_open_files(10**9)\nprint(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    expected = [min(1256, hard), min(1256, hard), hard if hard != resource.RLIM_INFINITY else 10**9 + 256]
    assert [int(line) for line in done.stdout.split()] == expected
