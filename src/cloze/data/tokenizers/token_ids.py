"""The ids of a tokenizer's tokens: how many rows an embedding needs, and which of them no token has.

vocabulary_size(tokenizer)      # the largest id + 1: what embeddings, masks and tables are sized by
missing_ids(tokenizer)          # ids below it without a token: vocab.txt with a line twice, a mask token far above

unknown_id(tokenizer)           # the token of text that it does not know, also if only tokenizer.json names it
special_ids(tokenizer)          # the tokens that are never masked

`len(tokenizer)` counts tokens. It is smaller than the largest id + 1 where ids have gaps, so nothing may be sized by
it (a test looks for such code).
"""

from __future__ import annotations

import json
from typing import Any

from cloze.errors import ModelError

# A vocabulary may have this many ids without a token, in addition to one for each token: more is a mistake that costs
# memory for rows that are never used.
MOST_MISSING = 10_000


def token_names(tokenizer: Any) -> list[str | None]:
    """Return the token of every id from 0 to the largest one; None if no token has the id.

    Raises ModelError if the largest id is out of proportion to the number of tokens.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    size = max(vocabulary.values(), default=-1) + 1
    if size > 2 * len(vocabulary) + MOST_MISSING:
        raise ModelError(
            f"its largest token id is {size - 1:,}, but it has {len(vocabulary):,} tokens",
            where=getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__,
            hint="number its tokens from 0 on without large gaps: a model needs a row for every id",
        )
    names: list[str | None] = [None] * size
    for name, token in vocabulary.items():
        names[token] = name
    return names


def vocabulary_size(tokenizer: Any) -> int:
    """Return the largest token id + 1. Raises ModelError as `token_names` does."""
    return len(token_names(tokenizer))


def missing_ids(tokenizer: Any) -> list[int]:
    """Return the ids below the vocabulary's size that no token has, in order."""
    return [token for token, name in enumerate(token_names(tokenizer)) if name is None]


def unknown_id(tokenizer: Any) -> int | None:
    """Return the id of the token for text that the tokenizer does not know; None without such a token, as in
    byte-level vocabularies.

    tokenizer_config.json need not name it: the model in tokenizer.json has an unknown token of its own.
    """
    if tokenizer.unk_token_id is not None:
        return int(tokenizer.unk_token_id)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    name = getattr(backend.model, "unk_token", None)  # of WordPiece, BPE and WordLevel
    if name is not None:
        found: int | None = backend.token_to_id(name)
        return found
    place: int | None = json.loads(backend.to_str())["model"].get("unk_id")  # of Unigram
    return place


def special_ids(tokenizer: Any) -> list[int]:
    """Return the ids of special tokens, the unknown token included, in order."""
    unknown = unknown_id(tokenizer)
    return sorted({*tokenizer.all_special_ids, *(() if unknown is None else (unknown,))})
