"""Make blocks during training from a corpus that is never stored, for corpora larger than the disk.

    stream = BlockStream(corpus.tasks, recipe, seed=42, rank=1, world_size=4, unit_bytes=32_000_000)
    blocks, segments = stream.take(8)           # [8, block_size] int32; segments for best_fit packing, else None
    stream.position                             # {"epoch": 0, "part": 3, "chunk": 0, "block": 1208}

The parts of the corpus (pieces of files, or whole streams) are visited in an order drawn from (seed, epoch) and
divided among the ranks. Each chunk of a part is tokenized, packed and shuffled by itself. A position is four integers;
to resume from it, one chunk is read again. Compared with prepared blocks: the order depends on the number of ranks,
shuffling is within chunks only, each chunk loses less than a block of tokens, and a packed file is read from its
start.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cloze.data.batches.counter_rng import make_key
from cloze.data.batches.sampler import permute
from cloze.data.corpus.fields import BadRecord
from cloze.data.corpus.formats import Raw
from cloze.data.corpus.sources import Task, bad_record_error, document_of, items_of
from cloze.data.prepare.scheduler import chunks_of
from cloze.data.prepare.unit import BATCH_CHARACTERS, Recipe, is_validation, make_packer, records_of_chunk
from cloze.data.prepared.packing import BestFit, Concat, Packed
from cloze.data.tokenizers.encoders import Encoder, batches
from cloze.errors import ConfigError, DataError

_PURPOSE_PARTS, _PURPOSE_BLOCKS = 0x7061727473, 0x626C6F636B73
Segments = NDArray[np.int32] | None
Records = list[tuple[int, Raw]] | None


@dataclass(frozen=True)
class StreamPosition:
    """The position of a rank's next block: block `block` of chunk `chunk` of the `part`-th part of epoch `epoch`."""

    epoch: int = 0
    part: int = 0
    chunk: int = 0
    block: int = 0


class BlockStream:
    """One rank's endless stream of blocks. Raises ConfigError if there are fewer parts than ranks, DataError for
    broken files, and for bad records unless they are skipped."""

    def __init__(
        self,
        tasks: list[Task],
        recipe: Recipe,
        seed: int,
        rank: int,
        world_size: int,
        unit_bytes: int,
        position: dict[str, int] | None = None,
    ):
        self._tasks = [task for task in tasks if task.side != "validation"]
        # With fewer streams than ranks, every rank reads all streams and takes its share of the chunks.
        self._by_chunk = 0 < sum(task.stream is not None for task in self._tasks) < world_size
        if len(self._tasks) < world_size and not self._by_chunk:
            raise ConfigError(
                f"{world_size} processes, but the corpus has {len(self._tasks)} parts",
                where="--streaming_train",
                hint="use a smaller --unit_size, fewer processes, or `cloze prepare`",
            )
        self._recipe, self._seed, self._rank, self._world = recipe, seed, rank, world_size
        self._unit_bytes = unit_bytes
        self._encode = Encoder(recipe.encoder)
        self._at = StreamPosition(**position or {})
        self._skip = self._at.block  # of the first chunk
        self._chunks = self._walk(self._at)
        self._packed: tuple[NDArray[np.int32], Segments] = np.empty((0, recipe.block_size), np.int32), None
        self._order = np.empty(0, np.int64)
        self._epoch_with_blocks = self._at.epoch

    @property
    def position(self) -> dict[str, int]:
        """Return the position of the next block, from which a new stream can resume."""
        return asdict(self._at)

    def take(self, count: int) -> tuple[NDArray[np.int32], Segments]:
        """Return the next `count` blocks [count, block_size], and their segments, of the same shape, if packed by
        best_fit."""
        none = np.empty((0, self._recipe.block_size), np.int32)
        blocks: list[NDArray[np.int32]] = [none]
        segments: list[NDArray[np.int32]] = [none] if self._recipe.packing == "best_fit" else []
        while count:
            while self._at.block >= len(self._order):
                self._next_chunk()
            here = self._order[self._at.block : self._at.block + count]
            blocks.append(self._packed[0][here])
            if self._packed[1] is not None:
                segments.append(self._packed[1][here])
            self._at = replace(self._at, block=self._at.block + len(here))
            count -= len(here)
        return np.concatenate(blocks), np.concatenate(segments) if segments else None

    def _next_chunk(self) -> None:
        """Tokenize, pack and shuffle the next chunk of this rank."""
        place, task, records = next(self._chunks)
        if place.epoch > self._epoch_with_blocks + 1:
            raise DataError("not one block of text", where=task.name, hint="check --text_field and --block_size")
        packed = self._pack(task, records)
        count = len(packed.blocks)
        if count:
            self._epoch_with_blocks = place.epoch
        self._packed = packed.blocks, segments_of(packed) if self._recipe.packing == "best_fit" else None
        key = make_key(self._seed, _PURPOSE_BLOCKS, place.epoch, place.part, place.chunk)
        self._order = permute(np.arange(count), count, key) if count else np.empty(0, np.int64)
        self._at, self._skip = replace(place, block=self._skip), 0

    def _walk(self, start: StreamPosition) -> Iterator[tuple[StreamPosition, Task, Records]]:
        """Yield this rank's chunks from `start` on, over all epochs, with the task and, for a stream, the records."""
        count = len(self._tasks)
        for epoch in itertools.count(start.epoch):
            order = permute(np.arange(count), count, make_key(self._seed, _PURPOSE_PARTS, epoch))
            for part, number in enumerate(order.tolist()):
                if epoch == start.epoch and part < start.part:
                    continue
                task = self._tasks[number]
                for chunk, records in self._chunks_of(task, part):
                    if (epoch, part) != (start.epoch, start.part) or chunk >= start.chunk:
                        yield StreamPosition(epoch, part, chunk), task, records

    def _chunks_of(self, task: Task, part: int) -> Iterator[tuple[int, Records]]:
        """Yield this rank's numbered chunks of a part."""
        by_chunk = self._by_chunk and task.stream is not None
        if not by_chunk and part % self._world != self._rank:
            return
        if task.stream is None:
            yield 0, None
            return
        for chunk, (records, _) in enumerate(chunks_of(task, self._recipe.fields, self._unit_bytes)):
            if not by_chunk or chunk % self._world == self._rank:
                yield chunk, records

    def _pack(self, task: Task, chunk: Records) -> Packed:
        fields = self._recipe.fields
        texts = []
        for place, raw in items_of(task, fields) if chunk is None else records_of_chunk(task, chunk):
            try:
                document = document_of(raw, fields)
            except BadRecord as error:
                if not self._recipe.skip_bad_records:
                    raise bad_record_error(error, place()) from None
                continue
            if document.text.strip() and not is_validation(document.id, self._recipe.validation_percentage):
                texts.append(document.text)
        return pack_texts(texts, self._recipe, self._encode)


def pack_texts(texts: list[str], recipe: Recipe, encode: Encoder) -> Packed:
    """Encode documents and pack them by themselves."""
    packer: Concat | BestFit = make_packer(recipe)
    parts = []
    for batch in batches(texts, BATCH_CHARACTERS):
        tokens, lengths = encode(batch)
        if isinstance(packer, Concat):
            parts.append(packer.add(tokens, lengths))
        else:
            packer.add(tokens, lengths)
    if isinstance(packer, BestFit):
        return packer.flush()
    blocks = np.concatenate([np.empty((0, recipe.block_size), np.int32), *[part.blocks for part in parts]])
    return Packed(blocks, np.empty(0, np.int64), np.empty(0, np.int64))


def segments_of(packed: Packed) -> NDArray[np.int32]:
    """Return the number of each token's piece in its block [n, block_size]; padding counts as one more piece."""
    size = packed.blocks.shape[1]
    first = np.cumsum(packed.counts) - packed.counts
    out = np.repeat(packed.counts[:, None], size, axis=1).astype(np.int32)
    for row, (begin, count) in enumerate(zip(first.tolist(), packed.counts.tolist(), strict=True)):
        pieces = packed.lengths[begin : begin + count]
        out[row, : int(pieces.sum())] = np.repeat(np.arange(count, dtype=np.int32), pieces)
    return out
