"""Documents to blocks. A corpus comes in units; each is a list of documents, each a list of tokens."""

from __future__ import annotations

from collections.abc import Iterable

Document = list[int]
Block = list[Document]  # its pieces; their tokens may be fewer than the block's
KEPT_BACK = 16


def concat(units: list[list[Document]], size: int) -> list[Document]:
    """Return blocks of documents end to end, cut every `size` tokens."""
    blocks, tails = [], []
    for unit in units:
        stream = flat(unit)
        full = len(stream) // size * size
        blocks += [stream[i : i + size] for i in range(0, full, size)]
        tails += stream[full:]
    return blocks + [tails[i : i + size] for i in range(0, len(tails) // size * size, size)]


def best_fit(units: list[list[Document]], size: int) -> list[Block]:
    """Return blocks of whole pieces: each, the longest first, is in the fullest block that had room for it."""
    blocks: list[Block] = []
    waiting: list[Document] = []
    for unit in units:
        pieces = [document[i : i + size] for document in unit for i in range(0, len(document), size)]
        packed = pack(pieces, size)
        open_blocks = [block for block in packed if room(block, size)]
        kept = sorted(open_blocks, key=lambda block: -room(block, size))[:KEPT_BACK]
        taken = [piece for block in kept for piece in block]
        waiting += [piece for piece in pieces if any(piece is other for other in taken)]
        blocks += [block for block in packed if all(block is not other for other in kept)]
    return blocks + pack(waiting, size)


def pack(pieces: list[Document], size: int) -> list[Block]:
    """Return the blocks of best-fit decreasing, each with its pieces in the order in which they came."""
    blocks: list[list[int]] = []  # numbers of pieces
    filled: list[int] = []  # blocks by when they were filled last
    lengths = [len(piece) for piece in pieces]
    for number in sorted(range(len(pieces)), key=lambda number: -lengths[number]):
        fitting = [b for b in filled if size - sum(lengths[n] for n in blocks[b]) >= lengths[number]]
        if fitting:
            chosen = min(reversed(fitting), key=lambda b: size - sum(lengths[n] for n in blocks[b]))
            filled.remove(chosen)
        else:
            chosen = len(blocks)
            blocks.append([])
        blocks[chosen].append(number)
        filled.append(chosen)
    return [[pieces[number] for number in sorted(block)] for block in blocks]


def flat(pieces: Iterable[Document]) -> Document:
    """Return the tokens of pieces end to end."""
    return [token for piece in pieces for token in piece]


def room(block: Block, size: int) -> int:
    """Return how many tokens more a block could take."""
    return size - sum(len(piece) for piece in block)
