"""Whether transformers makes the tokenizer that tokenizer.json describes.

transformers 5 takes vocabulary and merges from tokenizer.json, and builds the rest anew from the class that
tokenizer_config.json names. Where the file has another normalizer or pre-tokenizer than this class, its texts become
other tokens. So tokenizers are compared with `tokenizers.Tokenizer.from_file`, which reads the file and nothing else.

    stored = stored_tokenizer(tokenizer)            # None without a tokenizer.json
    first_difference(tokenizer, stored, texts)      # the first text with other ids; None if all agree
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers.utils import cached_file

from cloze.utils.foreign.pretrained import read_tokenizer_file

FILE = "tokenizer.json"
# What tokenizers stumble over. Lone surrogates never reach a tokenizer: they are U+FFFD by then.
ODD_TEXTS = (
    "",
    " ",
    "  two  spaces\t\ttabs \r\n\n newlines \u00a0\u2003\u3000 other spaces ",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ☃️ and text",
    "漢字とかな交じり文。中文混排，한국어도 있다。",
    "שלום עולם ‏مرحبا بالعالم‎ mixed with English",
    "हिन्दी ไทย தமிழ் မြန်မာ combining: é ễ ﬁ Ǆ",
    "control \x00\x01\x07\x1b[31m\x7f\x85 characters \ufeff\u200b\u200d\u2060",
    "replacement \ufffd\ufffd of lone surrogates, private \ue000 and \U0010fffd",
    "it's we'll I'VE don’t 3.14159 1,000,000 x=y+z; a_b-c/d\\e|f~g",
    "http://example.org/a?b=c&d=%20#e user@example.org C++ <html>&amp;</html>",
    "ſtraße İstanbul ΑΣ ﬀ ㎏ ½ ² Ⅳ",
    "In 2023 the River Café sold 1,250 lanterns; nobody didn't notice (it's IN THE NEWS).\nÅngström, naïve.",
)


def tokenizer_file(name: str, token: str | None = None) -> Path | None:
    """Return the tokenizer.json of a folder, or the downloaded one of a Hub name; None without one."""
    if Path(name).is_dir():
        return Path(name) / FILE if (Path(name) / FILE).is_file() else None
    if not name or Path(name).exists():
        return None
    try:
        found = cached_file(
            name, FILE, local_files_only=True, token=token, _raise_exceptions_for_missing_entries=False
        )
    except (OSError, ValueError):  # no such name, or not downloaded
        return None
    return None if found is None else Path(found)


def stored_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """Return what the tokenizer.json of a loaded tokenizer describes, with the tokens that tokenizer_config.json adds.

    None if it was not loaded from such a file. Raises Exception (of `tokenizers`) if the file cannot be read.
    """
    file = tokenizer_file(str(tokenizer.name_or_path or "")) if hasattr(tokenizer, "backend_tokenizer") else None
    if file is None:
        return None
    stored = read_tokenizer_file(file)
    stored.no_truncation()
    stored.no_padding()
    known = {(added.content, added.special) for added in stored.get_added_tokens_decoder().values()}
    for _, added in sorted(tokenizer.added_tokens_decoder.items()):
        if (added.content, added.special) not in known:
            stored.add_special_tokens([added]) if added.special else stored.add_tokens([added])
    return stored


def first_difference(
    tokenizer: Any, stored: Tokenizer, texts: list[str], split_special_tokens: bool = False
) -> str | None:
    """Return the first text to which the two give other ids, special tokens included; None if all agree."""
    stored.encode_special_tokens = split_special_tokens
    found = reference(tokenizer, texts, split_special_tokens)
    for text, ids in zip(texts, found, strict=True):
        if stored.encode(text).ids != ids:
            return text
    return None


def reference(tokenizer: Any, texts: list[str], split_special_tokens: bool) -> list[list[int]]:
    """Return the tokenizer's own ids of each text, with special tokens and without truncation."""
    limit, tokenizer.model_max_length = tokenizer.model_max_length, int(1e30)  # no warnings of long texts
    options = {"split_special_tokens": True} if split_special_tokens else {}
    try:
        return [list(tokenizer(text, **options)["input_ids"]) for text in texts]
    finally:
        tokenizer.model_max_length = limit


def special_texts(tokenizer: Any) -> list[str]:
    """Return texts that spell the special tokens."""
    tokens = [str(token) for token in tokenizer.all_special_tokens]
    return [f"a {token} b{token}c" for token in tokens] + ["".join(tokens), " ".join(tokens)]
