"""A stream of blocks: every document once an epoch over all ranks, and any position is a place to go on from."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from cloze.config import SourceConfig
from cloze.data.corpus.sources import open_corpus
from cloze.data.prepare.streaming import BlockStream
from cloze.data.prepare.unit import Recipe
from cloze.data.tokenizers.encoders import EncoderSpec
from cloze.data.tokenizers.load import load_tokenizer
from cloze.data.tokenizers.select_encoder import choose_encoder
from cloze.errors import ConfigError, DataError

UNIT = 6_000
SIZE = 16


@pytest.fixture(scope="module")
def sources(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same lines as pieces of one file, as one packed file, and as several packed files."""
    folder = tmp_path_factory.mktemp("streams")
    content = (prepared.parent / "corpus.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    (folder / "pieces.jsonl").write_bytes(content)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    (folder / "several").mkdir()
    for number in range(4):
        part = b"".join(lines[number::4])
        (folder / "several" / f"{number}.jsonl.gz").write_bytes(gzip.compress(part, 1, mtime=0))
    return {"pieces": folder / "pieces.jsonl", "packed": folder / "packed.jsonl.gz", "several": folder / "several"}


@pytest.fixture(scope="module")
def encoder(prepared: Path) -> EncoderSpec:
    return choose_encoder(load_tokenizer(str(prepared.parent / "tokenizer")), "tokenizers", False, [])


def open_stream(source: Path, encoder, rank: int, world_size: int, position=None, **more) -> BlockStream:
    corpus = open_corpus(SourceConfig(dataset_name=str(source), text_field="answers.text"), unit_bytes=UNIT)
    values = {
        "encoder": encoder,
        "fields": corpus.fields,
        "block_size": SIZE,
        "packing": "concat",
        "pad_token_id": 1,
        "validation_percentage": 0.0,
        "skip_bad_records": False,
    }
    recipe = Recipe(**values | more)
    return BlockStream(corpus.tasks, recipe, 7, rank, world_size, UNIT, position)


def epoch_of(stream: BlockStream, epoch: int) -> list[tuple[int, ...]]:
    """A rank's blocks of one epoch."""
    blocks = []
    while stream.position["epoch"] <= epoch:
        before = stream.position
        block = tuple(stream.take(1)[0][0].tolist())
        if stream.position["epoch"] == epoch:
            blocks.append(block)
        assert stream.position != before
    return blocks


@pytest.mark.parametrize("name", ["pieces", "packed", "several"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_is_every_block_once_over_all_ranks(sources, encoder, name: str, world_size: int):
    alone = sorted(epoch_of(open_stream(sources[name], encoder, 0, 1), 0))
    assert len(alone) > 300
    for epoch in (0, 1):
        shared = [epoch_of(open_stream(sources[name], encoder, rank, world_size), epoch) for rank in range(world_size)]
        assert sorted(block for blocks in shared for block in blocks) == alone
        assert min(len(blocks) for blocks in shared) > 0
    first, second = (epoch_of(open_stream(sources[name], encoder, 0, 1), epoch) for epoch in (0, 1))
    assert first != second, "epochs have orders of their own"


@pytest.mark.parametrize("name", ["pieces", "packed", "several"])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_any_position_is_a_place_to_go_on_from(sources, encoder, name: str, packing: str):
    for rank, world_size in ((0, 1), (1, 2)):
        whole = open_stream(sources[name], encoder, rank, world_size, packing=packing)
        portions = [3, 1, 40, 7, 100, 2, 900, 5, 1, 60]
        places, taken = [], []
        for count in portions:
            places.append(whole.position)
            taken.append(whole.take(count))
        assert places[-1]["epoch"] >= 1
        for number, place in enumerate(places):
            stream = open_stream(sources[name], encoder, rank, world_size, place, packing=packing)
            for count, (blocks, segments) in zip(
                portions[number : number + 3], taken[number : number + 3], strict=True
            ):
                again = stream.take(count)
                assert (again[0] == blocks).all()
                assert (segments is None) == (packing == "concat")
                assert segments is None or (again[1] == segments).all()


def test_documents_for_validation_are_left_out(sources, encoder):
    every = np.array(epoch_of(open_stream(sources["pieces"], encoder, 0, 1), 0))
    most = np.array(epoch_of(open_stream(sources["pieces"], encoder, 0, 1, validation_percentage=25.0), 0))
    assert 0.65 * len(every) < len(most) < 0.85 * len(every)


def test_a_stream_without_text_or_with_too_few_parts_is_refused(sources, encoder, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text('{"answers": {"text": [" "]}}\n' * 5)
    with pytest.raises(DataError, match="--text_field"):
        open_stream(tmp_path / "empty.jsonl", encoder, 0, 1).take(1)
    with pytest.raises(ConfigError, match="50 processes, but the corpus has"):
        open_stream(sources["pieces"], encoder, 0, 50)
    (tmp_path / "bad.jsonl").write_text('{"answers": {"text": ["fine"]}}\n{"answers": 3}\n')
    with pytest.raises(DataError, match=r"bad.jsonl, line 2: no field 'answers.text'"):
        open_stream(tmp_path / "bad.jsonl", encoder, 0, 1).take(1)
