"""Blocks on disk as an array: mapped, not read, and no file is touched before one of its blocks is asked for.

blocks = Blocks([(Path("data-00000-of-00002.arrow"), 60_000), ...], block_size=128)
blocks.read(np.array([7, 3]))            # [2, 128] int32
blocks.read_segments(np.array([7, 3]))   # [2, 128] int32: which document of its block each token belongs to
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.ipc
from numpy.typing import NDArray

from cloze.errors import DataError
from cloze.utils.foreign.paths import printable

# Linux lets a process map 65,530 files (vm.max_map_count); training and validation blocks have each a part of that.
MOST_MAPPED = 24_000
Ints = NDArray[np.int32]


class Batch(NamedTuple):
    """One record batch: ids [rows, block_size]; of best_fit packing also the pieces' lengths and where they begin."""

    ids: Ints
    offsets: Ints | None
    lengths: Ints | None


class Blocks:
    """The blocks of one split. `files`: each shard and how many blocks it holds.

    Reading raises DataError if the file is not an Arrow stream of such blocks, IndexError for a block out of range.
    """

    def __init__(self, files: list[tuple[Path, int]], block_size: int, has_pieces: bool = False):
        self.block_size, self.has_pieces = block_size, has_pieces
        self._files = files
        self._shards: list[list[Batch] | None] = [None] * len(files)
        self._ends = np.cumsum(np.array([count for _, count in files], np.int64))
        self._mapped: deque[int] = deque()  # shards, the one that was mapped first in front

    @property
    def paths(self) -> list[Path]:
        """Return the shards."""
        return [path for path, _ in self._files]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, indices: NDArray[np.int64]) -> Ints:
        """Return blocks [n, block_size] for indices [n] in any order."""
        out = np.empty((len(indices), self.block_size), np.int32)
        for place, (batch, row) in enumerate(self._locate(indices)):
            out[place] = batch.ids[row]
        return out

    def read_segments(self, indices: NDArray[np.int64]) -> Ints:
        """Return the number, from 0, of each token's piece in its block: indices [n] -> [n, block_size].

        Padding counts as one more piece.
        """
        out = np.empty((len(indices), self.block_size), np.int32)
        for place, (batch, row) in enumerate(self._locate(indices)):
            assert batch.offsets is not None
            assert batch.lengths is not None
            pieces = batch.lengths[batch.offsets[row] : batch.offsets[row + 1]]
            filled = int(pieces.sum())
            out[place, :filled] = np.repeat(np.arange(len(pieces), dtype=np.int32), pieces)
            out[place, filled:] = len(pieces)
        return out

    def _locate(self, indices: NDArray[np.int64]) -> Iterator[tuple[Batch, int]]:
        """Yield the batch and row of every block; in a shuffled corpus, nearly every one is in another shard."""
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"blocks are numbered 0 .. {len(self) - 1}")
        shards, rows = find_rows(self._ends, indices)
        for number, row in zip(shards.tolist(), rows.tolist(), strict=True):
            for batch in self._shard(number):
                if row < len(batch.ids):
                    yield batch, row
                    break
                row -= len(batch.ids)

    def _shard(self, number: int) -> list[Batch]:
        shard = self._shards[number]
        if shard is None:
            if len(self._mapped) >= MOST_MAPPED:
                self._shards[self._mapped.popleft()] = None
            shard = self._shards[number] = open_shard(*self._files[number], self.block_size, self.has_pieces)
            self._mapped.append(number)
        return shard


def find_rows(ends: NDArray[np.int64], indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the shard [n] and the row in it [n] of blocks: indices [n], ends [shards] -> ([n], [n]).

    `ends`: the number of blocks up to and including each shard; shards may be empty. A binary search: O(log shards).
    """
    shards = np.searchsorted(ends, indices, side="right")
    begins = np.where(shards > 0, ends[shards - 1], 0)
    return shards, indices - begins


def open_shard(path: Path, count: int, block_size: int, has_pieces: bool = False) -> list[Batch]:
    """Map a shard of `count` blocks. Raises DataError if it is not one, or has not the columns of its packing."""
    batches = []
    try:
        for batch in pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))):
            if batch.schema.names != ["input_ids", "piece_lengths"][: 1 + has_pieces]:
                raise ValueError(f"it has the columns {', '.join(map(printable, batch.schema.names))}")
            ids = _as_numpy(batch.column(0).values).reshape(-1, block_size)
            if not has_pieces:
                batches.append(Batch(ids, None, None))
            else:
                batches.append(Batch(ids, _as_numpy(batch.column(1).offsets), _as_numpy(batch.column(1).values)))
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        text = str(error).splitlines()[0]
        raise DataError(f"cannot be read ({text})", where=path, hint="prepare the corpus again") from None
    if sum(len(batch.ids) for batch in batches) != count:
        raise DataError(f"does not hold {count} blocks", where=path, hint="prepare the corpus again")
    return batches


def _as_numpy(values: Any) -> Ints:
    """Return a null-free int32 Arrow array as the same memory (its own `to_numpy` would import pandas first)."""
    return np.frombuffer(values.buffers()[1], np.int32, len(values), 4 * values.offset)
