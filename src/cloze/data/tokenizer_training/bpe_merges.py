"""Continue byte-pair encoding (Sennrich et al., 2016) from a tokenizer's merges, on counted words that it has split.

    merges = learn_merges([(["Ġmyo", "card", "ium"], 120), ...], number=1000, min_frequency=2, taken=vocabulary)

Each merge is the pair that currently saves most tokens: a greedy choice of N tokens.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Container, Iterable
from itertools import pairwise

from cloze.utils.terminal.console import progress

Pair = tuple[str, str]


def learn_merges(
    cuts: Iterable[tuple[list[str], int]],
    number: int,
    min_frequency: int,
    taken: Container[str],
    join: Callable[[str, str], str] = str.__add__,
    fit: Callable[[str], bool] = lambda token: True,
) -> list[Pair]:
    """Return at most `number` merges, in order: the most frequent pair first, ties by name.

    `cuts`: the tokens of each word and its count in the corpus; `taken`: existing tokens, which no merge makes again;
    `fit`: whether a token may be part of a merge.
    """
    words = [list(tokens) for tokens, count in cuts]
    frequency = [count for _, count in cuts]
    made: set[str] = set()
    counts: dict[Pair, int] = defaultdict(int)
    where: dict[Pair, set[int]] = defaultdict(set)
    for place, tokens in enumerate(words):
        for pair in pairwise(tokens):
            counts[pair] += frequency[place]
            where[pair].add(place)
    heap = [(-count, pair) for pair, count in counts.items() if count >= min_frequency]
    heapq.heapify(heap)
    merges: list[Pair] = []
    with progress("merges", total=number, unit="tokens") as advance:
        while heap and len(merges) < number:
            negative, pair = heapq.heappop(heap)
            if counts[pair] != -negative:
                continue  # an outdated entry; the heap has a newer one
            token = join(*pair)
            if token in taken or token in made or not (fit(pair[0]) and fit(pair[1])):
                continue
            made.add(token)
            merges.append(pair)
            touched: set[Pair] = set()
            for place in where.pop(pair):
                before, after = words[place], _merged(words[place], pair, token)
                for other in pairwise(before):
                    counts[other] -= frequency[place]
                    touched.add(other)
                for other in pairwise(after):
                    counts[other] += frequency[place]
                    where[other].add(place)
                    touched.add(other)
                words[place] = after
            for other in touched:
                if counts[other] >= min_frequency:
                    heapq.heappush(heap, (-counts[other], other))
            advance()
    return merges


def _merged(tokens: list[str], pair: Pair, token: str) -> list[str]:
    """Return the tokens with every occurrence of a pair, from the left, merged."""
    merged: list[str] = []
    place = 0
    while place < len(tokens):
        if place + 1 < len(tokens) and (tokens[place], tokens[place + 1]) == pair:
            merged.append(token)
            place += 2
        else:
            merged.append(tokens[place])
            place += 1
    return merged
