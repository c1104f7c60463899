"""Blocks on disk: what was written is what is read, in any order, and damage is noticed."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest

from cloze.data import shards
from cloze.data.shards import Blocks, ShardWriter, open_prepared, verify_prepared, write_manifest
from cloze.errors import DataError

BLOCK_SIZE = 16


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """A prepared folder of 103 blocks in batches of 10 and shards of 25."""
    monkeypatch.setattr(shards, "BATCH_ROWS", 10)
    monkeypatch.setattr(shards, "SHARD_BYTES", 25 * BLOCK_SIZE * 4)
    blocks = np.random.default_rng(0).integers(0, 2**31 - 1, (103, BLOCK_SIZE)).astype(np.int32)
    writer = ShardWriter(tmp_path / "train", BLOCK_SIZE)
    for part in np.split(blocks, [1, 2, 40, 41, 90]):
        writer.add(part)
    assert writer.num_blocks == 103
    write_manifest(tmp_path, {"block_size": BLOCK_SIZE, "splits": {"train": {"shards": writer.close()}}})
    return tmp_path, blocks


def test_any_rows_in_any_order_are_the_ones_that_were_written(written: tuple[Path, np.ndarray]):
    folder, blocks = written
    opened = open_prepared(folder).blocks("train")
    assert len(opened) == 103
    assert sorted(path.name for path in (folder / "train").glob("*.arrow")) == [
        f"data-0000{i}-of-00005.arrow" for i in range(5)
    ]
    order = np.random.default_rng(1).integers(0, 103, 500)
    assert (opened.read(order) == blocks[order]).all()
    assert opened.read(np.empty(0, np.int64)).shape == (0, BLOCK_SIZE)
    for wrong in (-1, 103):
        with pytest.raises(IndexError):
            opened.read(np.array([wrong]))


def test_datasets_opens_the_folder_too(written: tuple[Path, np.ndarray]):
    folder, blocks = written
    loaded = datasets.load_from_disk(str(folder))["train"]
    assert np.array_equal(np.array(loaded["input_ids"]), blocks)


def test_the_bytes_depend_on_the_blocks_only(written: tuple[Path, np.ndarray], tmp_path: Path):
    folder, blocks = written
    again = ShardWriter(tmp_path / "again", BLOCK_SIZE)
    again.add(blocks)
    facts = again.close()
    assert facts == open_prepared(folder).manifest["splits"]["train"]["shards"]


def test_a_missing_short_or_changed_shard_is_named(written: tuple[Path, np.ndarray]):
    folder, _ = written
    verify_prepared(folder)
    shard = folder / "train" / "data-00003-of-00005.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-50] + bytes([content[-50] ^ 1]) + content[-49:])
    open_prepared(folder)
    with pytest.raises(DataError, match=r"data-00003-of-00005.arrow: damaged"):
        verify_prepared(folder)
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"data-00003-of-00005.arrow: \d+ bytes"):
        open_prepared(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"data-00003-of-00005.arrow: missing"):
        open_prepared(folder)


def test_a_folder_that_is_not_whole_is_not_a_prepared_folder(written: tuple[Path, np.ndarray], tmp_path: Path):
    folder, _ = written
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    for broken in ("", "{", "[]", text.replace('"block_size": 16', '"block_size": 17'), text.replace("1,", "9,", 1)):
        manifest.write_text(broken)
        with pytest.raises(DataError) as caught:
            open_prepared(folder)
        assert "\n" not in str(caught.value)
    manifest.unlink()
    with pytest.raises(DataError, match="not a prepared folder; make it with"):
        open_prepared(folder)
    with pytest.raises(DataError, match="no such folder"):
        open_prepared(tmp_path / "nowhere")


def test_an_empty_split_has_no_blocks():
    assert len(Blocks([], BLOCK_SIZE)) == 0
