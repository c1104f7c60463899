"""From token streams to blocks of one size.

`concat`: documents are laid end to end and cut every `block_size` tokens, exactly: nothing is padded, no document is
dropped or shortened, and the rest at the end waits for more. These are the blocks of the Hugging Face
tutorial's `group_texts`, without the tails that it drops every thousand documents.

`best_fit`: documents are kept whole if they fit. One longer than a block is cut into full blocks and a rest; then
every piece, the longest first, goes into the fullest block that has room for it (best-fit decreasing: Ding et al.,
"Fewer Truncations Improve Language Modeling", ICML 2024). Pieces of one length keep their order; of blocks that are
equally full the one that was filled last is taken. Blocks stand in the order in which they were begun, and in a block
the pieces in the order of the corpus. Blocks end with padding, and the length of each piece is kept, so that attention
can stay inside documents.

A corpus is packed in units (`cloze.data.prepare.unit`). Each gives its blocks, in the order of the units, and leaves
pieces for the blocks at the end: `concat` what does not fill a block, `best_fit` those of its 16 emptiest blocks that
are not full (of equally empty ones the first), in the order of the corpus. The pieces of all units, in order, are
packed in the same way; `concat` then drops what does not fill a block.

    packer = Concat(block_size=128)
    packed = packer.add(tokens, lengths)      # packed.blocks: [n, 128] int32, n >= 0
    packer.left_over                          # tokens waiting for more
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEFT_BLOCKS = 16  # of a unit, the emptiest blocks of `best_fit` are filled up with those of other units
Tokens = NDArray[np.int32]
Lengths = NDArray[np.int64]
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Packed:
    """Blocks [n, block_size]; for `best_fit` also the pieces: `counts` [n] per block, all `lengths` in sequence."""

    blocks: Tokens
    counts: Lengths
    lengths: Lengths


class Concat:
    """Buffers tokens until they fill a block."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.cut_documents = 0  # documents that end in another block than they begin in
        self._rest: Tokens = np.empty(0, np.int32)

    @property
    def left_over(self) -> int:
        """Return the number of buffered tokens, less than block_size."""
        return len(self._rest)

    def add(self, tokens: Tokens, lengths: Lengths) -> Packed:
        """Append documents: their tokens [n] in one stream, and the length of each; return the full blocks."""
        ends = np.cumsum(lengths) + len(self._rest)
        crosses = (ends - 1) // self.block_size != (ends - lengths) // self.block_size
        self.cut_documents += int((crosses & (lengths > 0)).sum())
        stream = np.concatenate([self._rest, tokens]) if len(self._rest) else tokens
        full = len(stream) // self.block_size
        self._rest = stream[full * self.block_size :].copy()
        return Packed(stream[: full * self.block_size].reshape(full, self.block_size), _NONE, _NONE)

    def close(self) -> tuple[Tokens, Lengths]:
        """Return the buffered tokens, as one piece, for another packer."""
        return self._rest, np.array([len(self._rest)] if len(self._rest) else [], np.int64)


class BestFit:
    """Collects documents; `flush` packs them, `close` returns the pieces of the emptiest blocks."""

    def __init__(self, block_size: int, pad_token_id: int):
        self.block_size, self._pad = block_size, pad_token_id
        self.cut_documents = 0  # documents that are longer than a block
        self._tokens: list[Tokens] = []
        self._lengths: list[Lengths] = []

    @property
    def left_over(self) -> int:
        """Return the number of tokens to be packed."""
        return sum(len(tokens) for tokens in self._tokens)

    def add(self, tokens: Tokens, lengths: Lengths) -> None:
        """Append documents: their tokens [n] in one stream, and the length of each."""
        self.cut_documents += int((lengths > self.block_size).sum())
        self._tokens.append(tokens)
        self._lengths.append(_cut(lengths, self.block_size))

    def flush(self, keep: int = 0) -> Packed:
        """Pack all pieces, except those of the `keep` emptiest blocks, which stay buffered."""
        tokens = np.concatenate([np.empty(0, np.int32), *self._tokens])
        lengths = np.concatenate([_NONE, *self._lengths])
        starts = np.cumsum(lengths) - lengths
        bins, spaces = best_fit(lengths, self.block_size)
        emptiest = np.argsort(-spaces, kind="stable")[:keep]
        kept = np.zeros(len(spaces), bool)
        kept[emptiest[spaces[emptiest] > 0]] = True
        waits = kept[bins]
        self._tokens = [_gather(tokens, starts[waits], lengths[waits])]
        self._lengths = [lengths[waits]]
        renumbered = np.cumsum(~kept) - 1
        return self._blocks(tokens, starts[~waits], lengths[~waits], renumbered[bins[~waits]], int((~kept).sum()))

    def close(self) -> tuple[Tokens, Lengths]:
        """Return the buffered pieces: their tokens in one stream, and the length of each."""
        return np.concatenate([np.empty(0, np.int32), *self._tokens]), np.concatenate([_NONE, *self._lengths])

    def _blocks(self, tokens: Tokens, starts: Lengths, lengths: Lengths, bins: Lengths, count: int) -> Packed:
        order = np.argsort(bins, kind="stable")
        starts, lengths, bins = starts[order], lengths[order], bins[order]
        counts = np.bincount(bins, minlength=count).astype(np.int64)
        ends = np.cumsum(lengths)
        before = np.concatenate([[0], ends])[np.cumsum(counts) - counts]  # tokens in the blocks before each block
        offsets = ends - lengths - np.repeat(before, counts)
        blocks = np.full(count * self.block_size, self._pad, np.int32)
        blocks[_positions(bins * self.block_size + offsets, lengths)] = _gather(tokens, starts, lengths)
        return Packed(blocks.reshape(count, self.block_size), counts, lengths)


def best_fit(lengths: Lengths, block_size: int) -> tuple[Lengths, Lengths]:
    """Pack by best-fit decreasing: lengths [n], each 1 .. block_size -> block per piece [n], space per block."""
    bins = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    full = int((lengths == block_size).sum())
    bins[order[:full]] = np.arange(full)
    spaces = [0] * full
    by_space: dict[int, list[int]] = {}  # free space -> blocks that have it, the newest last
    available = 0  # bit s is set if by_space[s] is not empty
    for piece, length in zip(order[full:].tolist(), lengths[order[full:]].tolist(), strict=True):
        fitting = available >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            found = by_space[space].pop()
            if not by_space[space]:
                available &= ~(1 << space)
        else:
            space, found = block_size, len(spaces)
            spaces.append(block_size)
        left = space - length
        spaces[found] = left
        bins[piece] = found
        if left:
            by_space.setdefault(left, []).append(found)
            available |= 1 << left
    return bins, np.array(spaces, np.int64)


def _cut(lengths: Lengths, block_size: int) -> Lengths:
    """Return the lengths of pieces (full blocks and a rest) from the lengths of documents."""
    counts = -(-lengths // block_size)
    pieces = np.full(int(counts.sum()), block_size, np.int64)
    last = np.cumsum(counts) - 1
    pieces[last[counts > 0]] = (lengths - (counts - 1) * block_size)[counts > 0]
    return pieces


def _positions(starts: Lengths, lengths: Lengths) -> Lengths:
    """Return start, start + 1, ... start + length - 1 for every piece in sequence."""
    if not len(lengths):
        return _NONE
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1])) + np.repeat(starts - (ends - lengths), lengths)


def _gather(tokens: Tokens, starts: Lengths, lengths: Lengths) -> Tokens:
    return tokens[_positions(starts, lengths)]
