"""Count the words of a stream of texts in bounded memory.

counts = count_words(texts, str.split)          # {"the": 51234, ...}, in the order of the alphabet
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

MAX_WORDS = 4_000_000  # different words held at a time: some 500 MB


def count_words(texts: Iterable[str], split: Callable[[str], Iterable[str]], limit: int = MAX_WORDS) -> dict[str, int]:
    """Return word -> count, sorted by word, so that the result does not depend on the order of the words in the texts.

    `split`: a text -> its words. Where more than `limit` different words are held, the rarest half is forgotten: the
    counts of frequent words stay exact, those of words that come and go are too small (as in lossy counting: Manku and
    Motwani, "Approximate Frequency Counts over Data Streams", 2002).
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split(text))
        if len(counts) > limit:
            floor = sorted(counts.values())[len(counts) // 2]
            counts = Counter({word: count for word, count in counts.items() if count > floor})
    return dict(sorted(counts.items()))
