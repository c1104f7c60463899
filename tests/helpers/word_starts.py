"""Word boundaries compared with the tokenizer's own."""

from __future__ import annotations

import numpy as np

from cloze.data.batches.word_boundaries import (
    words_of,
)


def agreement(tokenizer, texts: list[str]) -> tuple[int, int]:
    """Tokens of which `starts` says the same as `word_ids`, and all tokens."""
    words = words_of(tokenizer)
    same = total = 0
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
        numbers = encoded.word_ids()
        expected = [place == 0 or number != numbers[place - 1] for place, number in enumerate(numbers)]
        found = words.starts(np.array([encoded["input_ids"]], np.int32))[0]
        same, total = same + int((found == expected).sum()), total + len(expected)
    return same, total
