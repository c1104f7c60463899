"""Number of bytes and frequency of each token of a vocabulary, for evaluation.

facts = token_facts(tokenizer, blocks, device)      # TokenFacts: num_bytes [V], band [V], names of the bands
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloze.data.batches.loader import BlockSource
from cloze.data.tokenizers.token_ids import special_ids, token_names, vocabulary_size
from cloze.evaluation.perplexity import TokenFacts

BANDS = {"the 100 most frequent": 100, "the next 900": 1_000, "the next 9,000": 10_000, "all others": None}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BLOCKS_AT_ONCE = 8192


def token_facts(tokenizer: Any, blocks: BlockSource, device: torch.device) -> TokenFacts:
    """Return the facts of a tokenizer's tokens in the blocks to be scored, on the device."""
    band = frequency_bands(token_counts(blocks, vocabulary_size(tokenizer)))
    num_bytes = torch.from_numpy(token_bytes(tokenizer))
    return TokenFacts(num_bytes.to(device), torch.from_numpy(band).to(device), tuple(BANDS))


def token_counts(blocks: BlockSource, vocab_size: int) -> NDArray[np.int64]:
    """Return how often each token occurs in the blocks: [V]."""
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
        ids = blocks.read(np.arange(first, min(first + _BLOCKS_AT_ONCE, len(blocks))))
        counts += np.bincount(ids.reshape(-1), minlength=vocab_size)[:vocab_size]
    return counts


def frequency_bands(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the frequency band of each token, [V], from counts [V]; equally frequent tokens are ordered by id."""
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return np.searchsorted([end for end in BANDS.values() if end is not None], rank, side="right").astype(np.int64)


def token_bytes(tokenizer: Any) -> NDArray[np.int64]:
    """Return the number of UTF-8 bytes of each token's text, [V], including a space before it; 0 for special tokens.

    In byte-level vocabularies every character of a token is one byte, except in added tokens, whose names are text.
    Other tokens are decoded between two words, so that marks of continuation, of spaces and of the end of a word have
    their usual effect. If the decoder inserts spaces that the text did not have (protein models), a token is as long
    as its name.
    """
    special = set(special_ids(tokenizer))
    names = token_names(tokenizer)
    if _is_byte_level(tokenizer):
        added = tokenizer.get_added_vocab()
        lengths = [len(name.encode()) if name in added else len(name) for name in (name or "" for name in names)]
    elif _invents_spaces(tokenizer, [name for token, name in enumerate(names) if name and token not in special]):
        lengths = [len((name or "").encode()) for name in names]
    else:
        word = tokenizer("a", add_special_tokens=False)["input_ids"][-1:] or [0]
        without = len(_decode(tokenizer, [*word, *word]).encode())
        lengths = [
            1
            if _BYTE.fullmatch(name or "")
            else max(len(_decode(tokenizer, [*word, token, *word]).encode()) - without, 0)
            for token, name in enumerate(names)
        ]
    return np.array([0 if token in special else length for token, length in enumerate(lengths)], np.int64)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _invents_spaces(tokenizer: Any, names: list[str]) -> bool:
    """Return whether a tokenizer decodes two adjacent tokens with a space between them, unless its kind is known."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None or len(names) < 2:
        return False
    text = "".join(names[:2])
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer.convert_ids_to_tokens(ids) == names[:2] and _decode(tokenizer, ids) == " ".join(names[:2])


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return "ByteLevel" in {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))}
