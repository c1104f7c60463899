"""The tokenizer of a corpus: loading it, and what names it.

tokenizer = load_tokenizer("roberta-base")
fingerprint(tokenizer)              # the same for the same ids, wherever the tokenizer lies
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cloze.errors import ModelError
from cloze.foreign.pretrained import from_pretrained


def load_tokenizer(name: str, trust_remote_code: bool = False, token: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub name. Raises ModelError where it cannot be loaded or cannot mask."""
    tokenizer = from_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code, token=token)
    if tokenizer.mask_token_id is None:
        raise ModelError(
            "the tokenizer has no mask token",
            where=name,
            hint="take the tokenizer of an encoder (BERT, RoBERTa, ...), or make one with `cloze tokenizer`",
        )
    return tokenizer


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
    }
