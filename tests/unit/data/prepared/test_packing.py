"""Blocks match the reference for documents of any length: one block, one document, lengths around the block size."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import packing as reference
from reference.packing import flat, room

from cloze.data.prepared.packing import LEFT_BLOCKS, BestFit, Concat, best_fit

PAD = -1
FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def corpora(choose: Any) -> tuple[int, list[list[int]]]:
    """Draw a block size and the document lengths of each unit, many of them around that size."""
    size = choose(st.integers(1, 9))
    around = st.sampled_from([0, 1, size - 1, size, size + 1, 2 * size - 1, 2 * size, 2 * size + 1])
    unit = st.lists(around | st.integers(0, 3 * size), max_size=40)
    return size, choose(st.lists(unit, min_size=1, max_size=3))


def numbered(units: list[list[int]]) -> list[list[list[int]]]:
    """Return documents of these lengths whose tokens are all different."""
    ends = accumulate(length for unit in units for length in unit)
    documents = iter([list(range(end - length, end)) for length, end in zip(flat(units), ends, strict=True)])
    return [[next(documents) for _ in unit] for unit in units]


def stream(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(flat(documents), np.int32), np.array([len(document) for document in documents], np.int64)


@FEW
@given(corpora(), st.integers(1, 5))
@example((4, [[]]), 1)
@example((4, [[4]]), 1)  # one block of one document
@example((4, [[3], [3], [2]]), 1)  # the remainders of units make blocks
@example((4, [[5, 3]]), 2)
@example((4, [[4, 0, 4, 0], [0]]), 1)  # empty documents at the edge of a block
@example((1, [[1, 2]]), 1)
def test_concatenated_documents_are_cut_into_full_blocks(corpus: tuple[int, list[list[int]]], batch: int):
    size, units = corpus[0], numbered(corpus[1])
    last, found, rests = Concat(size), [], []
    for unit in units:
        packer = Concat(size)
        for first in range(0, len(unit), batch):
            found += packer.add(*stream(unit[first : first + batch])).blocks.tolist()
        ends = list(accumulate(map(len, unit)))
        places = [(end - len(document), end) for document, end in zip(unit, ends, strict=True) if document]
        assert packer.cut_documents == sum(begin // size != (end - 1) // size for begin, end in places)
        assert packer.left_over == sum(map(len, unit)) % size
        tokens, lengths = packer.close()
        assert lengths.tolist() == ([packer.left_over] if packer.left_over else [])
        rests += last.add(tokens, lengths).blocks.tolist()
    assert found + rests == reference.concat(units, size)


@FEW
@given(corpora(), st.integers(1, 5))
@example((4, [[]]), 1)
@example((4, [[4]]), 1)
@example((4, [[3, 1, 3, 2, 1, 1]]), 6)
@example((4, [[9, 8, 7, 5, 4, 3]]), 1)
@example((4, [[3] * 15]), 20)  # one block less than a unit keeps back, as many, and one more
@example((4, [[3] * 16, [1] * 3]), 20)
@example((4, [[3] * 17, [1] * 3]), 20)
@example((4, [[3] * 17 + [2], [1] * 3]), 20)
@example((4, [[0, 4, 0], [0]]), 1)
@example((64, [[63, 64, 65, 1, 127, 128, 129]]), 2)
def test_pieces_are_packed_as_in_the_reference(corpus: tuple[int, list[list[int]]], batch: int):
    size, units = corpus[0], numbered(corpus[1])
    last, packed = BestFit(size, PAD), []
    for unit in units:
        packer = BestFit(size, PAD)
        for first in range(0, len(unit), batch):
            packer.add(*stream(unit[first : first + batch]))
        assert packer.cut_documents == sum(len(document) > size for document in unit)
        assert packer.left_over == sum(map(len, unit))
        packed.append(packer.flush(keep=LEFT_BLOCKS))
        tokens, lengths = packer.close()
        assert packer.left_over == len(tokens) == lengths.sum()
        last.add(tokens, lengths)
    packed.append(last.flush())
    assert last.left_over == 0
    expected = reference.best_fit(units, size)
    rows = [row for part in packed for row in part.blocks.tolist()]
    assert rows == [flat(block) + [PAD] * (size - len(flat(block))) for block in expected]
    assert [n for part in packed for n in part.counts.tolist()] == [len(block) for block in expected]
    assert [n for part in packed for n in part.lengths.tolist()] == [len(p) for block in expected for p in block]


@FEW
@given(st.lists(st.lists(st.integers(1, 8), max_size=12), max_size=4), st.integers(0, 3))
@example([[9, 6, 3], [4, 5]], 1)
@example([[3, 3, 3], []], 2)  # of equally empty blocks, the first are kept back
def test_waiting_pieces_are_packed_with_later_ones(batches: list[list[int]], keep: int):
    size, packer, waiting = 9, BestFit(9, PAD), []
    for documents in numbered(batches):
        packer.add(*stream(documents))
        waiting += documents
        blocks = reference.pack(waiting, size)
        kept = sorted((b for b in blocks if room(b, size)), key=lambda block: -room(block, size))[:keep]
        made = [flat(block) for block in blocks if block not in kept]
        waiting = [piece for piece in waiting if any(piece in block for block in kept)]
        assert packer.flush(keep).blocks.tolist() == [block + [PAD] * (size - len(block)) for block in made]
        assert packer.close()[1].tolist() == [len(piece) for piece in waiting]


def test_thousands_of_documents_fill_their_blocks():
    lengths = np.random.default_rng(0).integers(5, 300, 20_000)
    _, spaces = best_fit(lengths[lengths <= 128], 128)
    assert spaces.sum() / (len(spaces) * 128) < 0.01
