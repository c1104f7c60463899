"""Train a Unigram language model tokenizer (Kudo, "Subword Regularization", ACL 2018) from word counts.

    pieces = train_unigram({"▁hello": 12, ...}, num_pieces=8000)       # [("▁", -2.1), ("▁hello", -5.3), ...]

The algorithm is SentencePiece's: begin with the most frequent substrings; then alternate between fitting their
probabilities to the corpus (EM over all segmentations) and removing the pieces whose loss costs least, until the
wanted number is left. The trainer of `tokenizers` is not used because it sums in the order of a hash table, so two
runs give different tokenizers. Here equal counts give equal pieces, and nothing runs in parallel.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from cloze.errors import DataError
from cloze.utils.terminal.console import progress

MAX_PIECE = 16  # characters; this and the shares below are SentencePiece's
KEEP_SHARE = 0.75  # of the pieces, in each pruning
EM_STEPS = 2  # between two prunings
SPARE = 1.1  # pieces beyond the wanted number before the last pruning
SEED_PIECES = 20  # initial substrings for each wanted piece
COVERAGE = 0.9995  # share of the corpus' characters that have a piece of their own
MAX_WORD = 32  # characters: longer words are split, because products of more probabilities could underflow
MAX_WORDS = 200_000  # different words, the most frequent ones

Edges = list[list[tuple[int, str]]]  # for each position in a word, the pieces that begin there and their ends


def train_unigram(words: Mapping[str, int], num_pieces: int) -> list[tuple[str, float]]:
    """Return up to `num_pieces` pieces with their log probabilities, highest first, from words and their counts.

    Raises DataError if the corpus has more characters than that.
    """
    counted = _cut_up(words)
    characters = _alphabet(counted, num_pieces // 4)
    if len(characters) > num_pieces:
        raise DataError(
            f"its {len(characters)} characters alone are more than {num_pieces} pieces",
            where="--vocab_size",
            hint="choose a larger one",
        )
    known = set(characters)
    pieces = _seed(counted, known, SEED_PIECES * num_pieces)
    wanted = max(int(SPARE * num_pieces), len(known))
    with progress("unigram", total=None, unit="rounds") as advance:
        while True:
            least = 0.5 if len(pieces) > wanted else 0.0  # the last pruning removes no wanted piece
            for _ in range(EM_STEPS):
                pieces = _maximized(_expected(counted, pieces), known, least)
            advance(note=f"{len(pieces):,} pieces")
            if len(pieces) <= wanted:
                break
            pieces = _pruned(counted, pieces, known, max(wanted, int(KEEP_SHARE * len(pieces))))
    ranked = sorted(pieces.items(), key=lambda one: (-one[1], one[0]))
    kept = [one for one in ranked if one[0] not in known][: num_pieces - len(known)]
    chosen = [*kept, *((piece, score) for piece, score in ranked if piece in known)]
    return sorted(((piece, round(score, 6)) for piece, score in chosen), key=lambda one: (-one[1], one[0]))


def _cut_up(words: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return the most frequent words, split into at most MAX_WORD characters, in a fixed order."""
    parts: Counter[str] = Counter()
    for word, count in sorted(words.items(), key=lambda one: (-one[1], one[0]))[:MAX_WORDS]:
        for begin in range(0, len(word), MAX_WORD):
            parts[word[begin : begin + MAX_WORD]] += count
    return sorted(parts.items())


def _alphabet(words: list[tuple[str, int]], plenty: int) -> list[str]:
    """Return the most frequent characters that cover COVERAGE of the corpus, but at least `plenty`."""
    counts: Counter[str] = Counter()
    for word, count in words:
        for character in word:
            counts[character] += count
    left = (1 - COVERAGE) * sum(counts.values())
    ranked = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    while len(ranked) > plenty and ranked[-1][1] <= left:
        left -= ranked.pop()[1]
    return [character for character, _ in ranked]


def _seed(words: list[tuple[str, int]], known: set[str], number: int) -> dict[str, float]:
    """Return the substrings with the largest frequency times length, and every character."""
    counts: Counter[str] = Counter()
    for word, count in words:
        for begin in range(len(word)):
            for end in range(begin + 1, min(len(word), begin + MAX_PIECE) + 1):
                if word[end - 1] not in known:
                    break
                counts[word[begin:end]] += count
    longer = [(piece, count) for piece, count in counts.items() if len(piece) > 1 and count > 1]
    longer.sort(key=lambda one: (-one[1] * len(one[0]), one[0]))
    chosen = {piece: float(count) for piece, count in longer[:number]}
    chosen |= {character: float(counts[character]) for character in sorted(known)}
    total = math.log(sum(chosen.values()))
    return {piece: math.log(count) - total for piece, count in chosen.items()}


def _edges(word: str, pieces: Mapping[str, float]) -> Edges:
    """Return the pieces at every position; an empty piece skips a character without one."""
    size = len(word)
    found: Edges = []
    for begin in range(size):
        here = []
        for end in range(begin + 1, min(size, begin + MAX_PIECE) + 1):
            piece = word[begin:end]
            if piece in pieces:
                here.append((end, piece))
        found.append(here if here and here[0][0] == begin + 1 else [(begin + 1, ""), *here])
    return found


def _expected(words: list[tuple[str, int]], pieces: Mapping[str, float]) -> dict[str, float]:
    """Return the expected count of each piece over all segmentations of each word, weighted by probability."""
    chance = {piece: math.exp(score) for piece, score in pieces.items()} | {"": 1.0}
    total: dict[str, float] = dict.fromkeys(pieces, 0.0)
    total[""] = 0.0
    for word, count in words:
        edges = _edges(word, pieces)
        size = len(word)
        before = [0.0] * (size + 1)
        after = [0.0] * (size + 1)
        before[0] = after[size] = 1.0
        for begin in range(size):
            for end, piece in edges[begin]:
                before[end] += before[begin] * chance[piece]
        for begin in range(size - 1, -1, -1):
            for end, piece in edges[begin]:
                after[begin] += chance[piece] * after[end]
        share = count / before[size]
        for begin in range(size):
            front = before[begin] * share
            for end, piece in edges[begin]:
                total[piece] += front * chance[piece] * after[end]
    del total[""]
    return total


def _maximized(expected: Mapping[str, float], known: set[str], least: float) -> dict[str, float]:
    """Return new scores from expected counts, with SentencePiece's sparse prior (digamma). Pieces with a count below
    `least` are removed, except characters."""
    kept = {piece: max(count, 0.5) for piece, count in expected.items() if count >= least or piece in known}
    total = _digamma(sum(kept.values()))
    return {piece: _digamma(count) - total for piece, count in kept.items()}


def _digamma(x: float) -> float:
    """Return the derivative of log gamma for x > 0, from its asymptotic series for x >= 7."""
    shift = 0.0
    while x < 7:
        shift -= 1 / x
        x += 1
    x -= 0.5
    square = 1 / (x * x)
    return shift + math.log(x) + square * (1 / 24 - square * (7 / 960 - square * (31 / 8064 - square * 127 / 30720)))


def best_cut(word: str, pieces: Mapping[str, float], without: str | None = None) -> list[str]:
    """Return the most probable segmentation of a word (Viterbi) that does not use the piece `without`."""
    size = len(word)
    best = [0.0] + [-math.inf] * size
    back = [("", 0)] * (size + 1)
    for begin, here in enumerate(_edges(word, pieces)):
        for end, piece in here:
            if piece == without:
                continue
            score = best[begin] + pieces.get(piece, -100.0)
            if score > best[end]:
                best[end], back[end] = score, (piece, begin)
    cut, place = [], size
    while place:
        piece, place = back[place]
        cut.append(piece)
    return cut[::-1]


def _pruned(words: list[tuple[str, int]], pieces: dict[str, float], known: set[str], number: int) -> dict[str, float]:
    """Return the `number` pieces whose removal would reduce the corpus's likelihood most, and all characters."""
    used: Counter[str] = Counter()
    for word, count in words:
        for piece in best_cut(word, pieces):
            used[piece] += count
    total = sum(used.values())
    costs = []
    for piece in pieces:
        if piece in known:
            continue
        count = used[piece]
        if not count:
            costs.append((0.0, piece))
            continue
        others = best_cut(piece, pieces, without=piece)
        # The segmentation that replaces the piece, whose pieces then become more frequent.
        after = total + count * (len(others) - 1)
        now = math.log(count) - math.log(total)
        then = sum(math.log(used[other] + count) - math.log(after) for other in others)
        costs.append((count * (now - then), piece))
    costs.sort(key=lambda one: (-one[0], one[1]))
    kept = known | {piece for _, piece in costs[: number - len(known)]}
    return {piece: score for piece, score in pieces.items() if piece in kept}
