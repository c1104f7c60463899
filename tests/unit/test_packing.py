"""Blocks hold every token once and in order: end to end, or with documents whole where they fit."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cloze.data.packing import BestFit, Concat, best_fit

LENGTHS = st.lists(st.integers(1, 150), max_size=40)
PAD = -1


@given(LENGTHS, st.integers(1, 64), st.integers(1, 5))
def test_concatenated_blocks_are_the_stream_cut_every_block_size_tokens(
    lengths: list[int], block_size: int, batch: int
):
    stream = np.arange(sum(lengths), dtype=np.int32)
    packer = Concat(block_size)
    parts = [np.empty((0, block_size), np.int32)]
    at = 0
    for first in range(0, len(lengths), batch):
        counts = np.array(lengths[first : first + batch])
        parts.append(packer.add(stream[at : at + counts.sum()], counts).blocks)
        at += int(counts.sum())
    blocks = np.concatenate(parts)
    full = len(stream) // block_size
    assert blocks.shape == (full, block_size)
    assert (blocks.reshape(-1) == stream[: full * block_size]).all()
    assert packer.left_over == len(stream) - full * block_size < block_size
    tail, counts = packer.close()
    assert tail.tolist() == stream[full * block_size :].tolist()
    assert counts.sum() == len(tail)
    ends = np.cumsum(lengths)
    crossing = sum(
        (end - 1) // block_size != (end - length) // block_size for end, length in zip(ends, lengths, strict=True)
    )
    assert packer.cut_documents == crossing


def pieces_of(packed) -> list[list[int]]:
    """The tokens of every piece, after checking that blocks hold pieces, then padding, and nothing else."""
    pieces, at = [], 0
    for block, count in zip(packed.blocks, packed.counts, strict=True):
        place = 0
        for length in packed.lengths[at : at + count]:
            pieces.append(block[place : place + length].tolist())
            place += length
        assert (block[place:] == PAD).all()
        at += count
    assert at == len(packed.lengths)
    return pieces


def cut(lengths: list[int], block_size: int) -> list[list[int]]:
    """Documents numbered through, cut into full blocks and a rest."""
    ends = np.cumsum(lengths)
    documents = [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    return [d[i : i + block_size] for d in documents for i in range(0, len(d), block_size)]


@given(LENGTHS, st.integers(1, 64), st.integers(0, 6), st.integers(1, 5))
def test_best_fit_keeps_every_piece_whole_and_loses_none(lengths: list[int], size: int, keep: int, batch: int):
    stream = np.arange(sum(lengths), dtype=np.int32)
    packer = BestFit(size, PAD)
    found, at = [], 0
    for first in range(0, len(lengths), batch):
        counts = np.array(lengths[first : first + batch])
        packer.add(stream[at : at + counts.sum()], counts)
        at += int(counts.sum())
        found += pieces_of(packer.flush(keep=keep))
    tokens, counts = packer.close()
    assert len(tokens) == counts.sum() == packer.left_over <= keep * size
    found += pieces_of(packer.flush())
    assert sorted(found) == cut(lengths, size)
    assert packer.cut_documents == sum(length > size for length in lengths)
    assert packer.left_over == 0


def naive(lengths: list[int], size: int) -> list[int]:
    """Best-fit decreasing, as one writes it down: the free space that is left in each block."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces[spaces.index(min(fitting))] -= length
        else:
            spaces.append(size - length)
    return sorted(spaces)


@given(st.lists(st.integers(1, 32), max_size=60))
def test_pieces_go_where_they_fit_best(lengths: list[int]):
    bins, spaces = best_fit(np.array(lengths, np.int64), 32)
    assert sorted(spaces.tolist()) == naive(lengths, 32)
    for number, space in enumerate(spaces.tolist()):
        assert sum(length for length, held in zip(lengths, bins, strict=True) if held == number) == 32 - space


def test_thousands_of_documents_fill_their_blocks():
    lengths = np.random.default_rng(0).integers(5, 300, 20_000)
    _, spaces = best_fit(lengths[lengths <= 128], 128)
    assert spaces.sum() / (len(spaces) * 128) < 0.01


def test_the_emptiest_blocks_are_kept_back():
    packer = BestFit(10, 0)
    lengths = np.array([10, 9, 8, 4, 3], np.int64)
    packer.add(np.repeat(np.arange(1, 6, dtype=np.int32), lengths), lengths)
    packed = packer.flush(keep=1)
    assert packed.lengths.tolist() == [10, 9, 8]
    tokens, waiting = packer.close()
    assert waiting.tolist() == [4, 3]
    assert tokens.tolist() == [4] * 4 + [5] * 3
