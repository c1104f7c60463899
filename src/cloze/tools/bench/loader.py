"""`cloze bench loader`: opening a prepared folder of many blocks, and masked batches of it from a cold page cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from cloze.config import BenchConfig
from cloze.data.prepared.packing import Packed
from cloze.data.prepared.shards import ShardWriter, describe_split, shard_name, write_manifest
from cloze.tools.bench.folder import work_folder
from cloze.tools.bench.table import Table
from cloze.utils.terminal.console import progress

BLOCKS_PER_SHARD = 60_000
VOCABULARY = 50_265
SECONDS = 5.0

# In a fresh process, so that memory and imports are those of opening alone.
MEASURE = """
import json, sys, time
from functools import partial
import numpy as np
from cloze.data.batches.layout import Layout
from cloze.data.batches.loader import BlockOrder, step_batches
from cloze.data.batches.masking import Masking
from cloze.data.prepared.shards import open_prepared

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

before, begin = resident(), time.perf_counter()
prepared = open_prepared(sys.argv[1])
blocks = prepared.blocks("train")
opened, grown = time.perf_counter() - begin, resident() - before
masking = Masking.from_manifest(prepared.manifest, seed=1)
layout = Layout(int(sys.argv[2]), 1, 0, 1)
def builder():
    order = BlockOrder(layout, len(blocks), masking.seed)
    return partial(step_batches, blocks, masking, layout, 10**15, order=order)

def first_batch(step):
    begin = time.perf_counter()
    builder()(step)
    return (time.perf_counter() - begin) * 1e3

for step in range(20):
    first_batch(step)
pairs = [(first_batch(10 + number), first_batch(10**6 + number)) for number in range(21)]
first = [sorted(column)[10] for column in zip(*pairs)]
build = builder()
step, tokens, begin = 1, 0, time.perf_counter()
while time.perf_counter() - begin < float(sys.argv[3]):
    tokens += build(step).micro_batches[0]["input_ids"].numel()
    step += 1
rate = tokens / (time.perf_counter() - begin)
print(json.dumps({"open_ms": opened * 1e3, "open_mib": grown, "tokens_per_second": rate, "blocks": step - 1,
                  "first_at_10_ms": first[0], "first_at_million_ms": first[1]}))
"""


def bench_loader(config: BenchConfig) -> Table:
    """Make the folder, drop it from the page cache, measure in a fresh process."""
    with work_folder(config.work_dir) as folder:
        prepared = make_blocks(folder / "prepared", config.num_blocks, config.block_size)
        forget(prepared)
        batch = config.per_device_train_batch_size or 32
        words = [sys.executable, "-c", MEASURE, str(prepared), str(batch), str(SECONDS)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        table = Table(f"{config.num_blocks:,} blocks of {config.block_size}", ["what", "figure", "unit"])
        table.add("opening the folder", found["open_ms"], "ms")
        table.add("memory it takes", found["open_mib"], "MiB")
        table.add("first batch of a run that resumes at step 10", found["first_at_10_ms"], "ms")
        table.add("first batch of a run that resumes at step 1,000,000", found["first_at_million_ms"], "ms")
        table.add(
            f"masked batches of {batch}, one process, cold page cache",
            found["tokens_per_second"] / 1e6,
            "Mtok/s",
        )
        table.add("blocks read meanwhile", found["blocks"] * batch, "blocks")
        return table


def make_blocks(folder: Path, num_blocks: int, block_size: int) -> Path:
    """Return a prepared folder of random blocks, as `cloze prepare` would lay it out."""
    (folder / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [
        shard_name(number, -(-num_blocks // BLOCKS_PER_SHARD)) for number in range(-(-num_blocks // BLOCKS_PER_SHARD))
    ]
    shards = []
    with progress("bench", total=num_blocks, unit="blocks") as advance:
        for number, name in enumerate(names):
            rows = min(BLOCKS_PER_SHARD, num_blocks - number * BLOCKS_PER_SHARD)
            ids = rng.integers(5, VOCABULARY - 1, (rows, block_size), dtype=np.int32)
            writer = ShardWriter(folder / "train" / name, block_size)
            writer.add(Packed(ids, np.empty(0, np.int64), np.empty(0, np.int64)))
            shards.append({"file": name, **(writer.close() or {})})
            advance(rows)
    describe_split(folder / "train", shards, block_size, pieces=False)
    tokenizer = {
        "vocab_size": VOCABULARY,
        "mask_token_id": VOCABULARY - 1,
        "special_token_ids": [0, 1, 2, 3, VOCABULARY - 1],
    }
    write_manifest(folder, {"block_size": block_size, "tokenizer": tokenizer, "splits": {"train": {"shards": shards}}})
    return folder


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache, as after a restart."""
    for path in folder.rglob("*.arrow"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
