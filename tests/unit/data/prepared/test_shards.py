"""Blocks on disk: what was written is what is read, in any order, and damage is noticed."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest

from cloze.data.prepared import shards
from cloze.data.prepared.blocks import Blocks
from cloze.data.prepared.packing import Packed
from cloze.data.prepared.shards import ShardWriter, describe_split, open_prepared, shard_name, write_manifest
from cloze.data.prepared.verified import verify_prepared
from cloze.errors import DataError

BLOCK_SIZE = 16
NONE = np.empty(0, np.int64)


def packed(blocks: np.ndarray, pieces: bool) -> Packed:
    """Blocks of which number n has n % 5 + 1 pieces of 3 tokens, then padding."""
    if not pieces:
        return Packed(blocks, NONE, NONE)
    counts = np.arange(len(blocks)) % 5 + 1
    return Packed(blocks, counts, np.full(counts.sum(), 3))


@pytest.fixture(params=[False, True], ids=["concat", "best_fit"])
def written(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """A prepared folder of 103 blocks, in shards of 25 and batches of 10."""
    monkeypatch.setattr(shards, "BATCH_ROWS", 10)
    folder, pieces = tmp_path / "p", request.param
    (folder / "train").mkdir(parents=True)
    blocks = np.random.default_rng(0).integers(0, 2**31 - 1, (103, BLOCK_SIZE)).astype(np.int32)
    listed = []
    for number, first in enumerate(range(0, 103, 25)):
        writer = ShardWriter(folder / "train" / shard_name(number, 5), BLOCK_SIZE, pieces)
        whole = packed(blocks, pieces)
        for part in np.array_split(np.arange(first, min(first + 25, 103)), 3):  # any portions, in any batch
            lengths = np.full(whole.counts[part].sum(), 3) if pieces else NONE
            writer.add(Packed(blocks[part], whole.counts[part] if pieces else NONE, lengths))
        listed.append({"file": shard_name(number, 5), **writer.close()})
    describe_split(folder / "train", listed, BLOCK_SIZE, pieces)
    packing = "best_fit" if pieces else "concat"
    write_manifest(folder, {"block_size": BLOCK_SIZE, "packing": packing, "splits": {"train": {"shards": listed}}})
    return folder, blocks


def test_any_rows_in_any_order_are_the_ones_that_were_written(written: tuple[Path, np.ndarray]):
    folder, blocks = written
    opened = open_prepared(folder).blocks("train")
    assert len(opened) == 103
    order = np.random.default_rng(1).integers(0, 103, 500)
    assert (opened.read(order) == blocks[order]).all()
    assert opened.read(np.empty(0, np.int64)).shape == (0, BLOCK_SIZE)
    for wrong in (-1, 103):
        with pytest.raises(IndexError):
            opened.read(np.array([wrong]))


def test_segments_number_the_pieces_of_a_block(written: tuple[Path, np.ndarray]):
    folder, _ = written
    opened = open_prepared(folder).blocks("train")
    if not opened.has_pieces:
        return
    order = np.random.default_rng(1).integers(0, 103, 200)
    for row, segments in zip(order, opened.read_segments(order), strict=True):
        pieces = row % 5 + 1
        expected = [number for number in range(pieces) for _ in range(3)]
        assert segments.tolist() == expected + [pieces] * (BLOCK_SIZE - len(expected))


def test_datasets_opens_the_folder_too(written: tuple[Path, np.ndarray]):
    folder, blocks = written
    loaded = datasets.load_from_disk(str(folder))["train"]
    assert np.array_equal(np.array(loaded["input_ids"]), blocks)
    if open_prepared(folder).packing == "best_fit":
        assert loaded[7]["piece_lengths"] == [3, 3, 3]


def test_the_bytes_of_a_shard_depend_on_its_blocks_only(tmp_path: Path):
    blocks = np.arange(40 * BLOCK_SIZE, dtype=np.int32).reshape(40, BLOCK_SIZE)
    facts = []
    for name, parts in (("one", [40]), ("two", [1, 2, 20, 17])):
        writer = ShardWriter(tmp_path / name, BLOCK_SIZE)
        for part in np.split(blocks, np.cumsum(parts)[:-1]):
            writer.add(packed(part, False))
        facts.append(writer.close())
    assert facts[0] == facts[1]
    assert ShardWriter(tmp_path / "none", BLOCK_SIZE).close() is None
    assert not (tmp_path / "none").exists()


def test_opening_touches_no_shard(written: tuple[Path, np.ndarray]):
    folder, blocks = written
    opened = open_prepared(folder).blocks("train")
    gone = folder / "train" / shard_name(3, 5)
    gone.rename(folder / "elsewhere")
    assert (opened.read(np.arange(75)) == blocks[:75]).all()
    with pytest.raises(DataError, match=f"{gone.name}: cannot be read"):
        opened.read(np.array([75]))


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


def test_a_shard_that_is_something_else_is_named(tmp_path: Path):
    (tmp_path / "junk.arrow").write_bytes(b"junk" * 100)
    with pytest.raises(DataError, match=r"junk.arrow: cannot be read"):
        Blocks([(tmp_path / "junk.arrow", 10)], BLOCK_SIZE).read(np.array([3]))
    writer = ShardWriter(tmp_path / "short.arrow", BLOCK_SIZE)
    writer.add(packed(np.zeros((4, BLOCK_SIZE), np.int32), False))
    writer.close()
    with pytest.raises(DataError, match=r"short.arrow: does not hold 10 blocks"):
        Blocks([(tmp_path / "short.arrow", 10)], BLOCK_SIZE).read(np.array([3]))


def test_an_empty_split_has_no_blocks():
    assert len(Blocks([], BLOCK_SIZE)) == 0
