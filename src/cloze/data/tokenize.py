"""From texts to token ids, with the tokenizer's own special tokens around each document.

tokenizer = load_tokenizer("roberta-base")
encode = Encoder(tokenizer)
tokens, lengths = encode(["one text", "another"])     # one int32 stream, and the length of each document in it
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cloze.errors import DataError, ModelError

_SAMPLE_TEXT = "Hello world"


def load_tokenizer(name: str, trust_remote_code: bool = False, token: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub name. Raises ModelError where it cannot be loaded or cannot mask."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, token=token)
    except (OSError, ValueError, ImportError, KeyError) as error:
        text = str(error).strip().splitlines()[0]
        remote = "trust_remote_code" in str(error)
        raise ModelError(
            f"cannot load the tokenizer ({text})",
            where=name,
            hint="it comes with Python code of its own: read it, then give --trust_remote_code"
            if remote
            else "give a folder with tokenizer.json, or the name of a model on the Hub",
        ) from None
    if tokenizer.mask_token_id is None:
        raise ModelError(
            "the tokenizer has no mask token",
            where=name,
            hint="take the tokenizer of an encoder (BERT, RoBERTa, ...), or make one with `cloze tokenizer`",
        )
    return tokenizer


class Encoder:
    """Encodes batches of documents. Raises DataError where the template of special tokens cannot be found."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        tokenizer.model_max_length = int(1e30)  # documents are cut into blocks later: a long one is no reason to warn
        self.tokenizer = tokenizer
        self.prefix, self.suffix = _template(tokenizer)

    def __call__(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """texts -> all their tokens in one stream [n] int32, and each document's length in it [len(texts)]."""
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        around = len(self.prefix) + len(self.suffix)
        lengths = np.fromiter((len(ids) + around for ids in encoded), np.int64, len(texts))
        stream = np.empty(int(lengths.sum()), np.int32)
        position = 0
        for ids in encoded:
            end = position + len(self.prefix)
            stream[position:end] = self.prefix
            stream[end : end + len(ids)] = ids
            position = end + len(ids) + len(self.suffix)
            stream[position - len(self.suffix) : position] = self.suffix
        return stream, lengths


def _template(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a single text."""
    bare = list(tokenizer(_SAMPLE_TEXT, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(_SAMPLE_TEXT)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise DataError(
        "the tokenizer changes a text's tokens when it adds special ones",
        where=type(tokenizer).__name__,
        hint="please report it with the tokenizer's name",
    )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The SHA-256 of everything that decides a text's ids: the fast tokenizer's own description, or the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        facts: dict[str, Any] = json.loads(backend.to_str())
        facts.pop("truncation", None)
        facts.pop("padding", None)
    else:
        facts = {"class": type(tokenizer).__name__, "vocab": sorted(tokenizer.get_vocab().items())}
    facts = {"backend": facts, "special": sorted(tokenizer.all_special_ids), "mask": tokenizer.mask_token_id}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def describe(tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
    """What the manifest says of the tokenizer; a local folder is named by its last part only."""
    return {
        "name": Path(name).name if Path(name).exists() else name,
        "class": type(tokenizer).__name__,
        "fingerprint": fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "special_token_ids": sorted(set(tokenizer.all_special_ids)),
        "backend": f"tokenizers {version('tokenizers')}",
    }
