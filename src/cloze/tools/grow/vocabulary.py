"""Of which old rows the embedding of each token of a new vocabulary is made.

    rows = vocabulary_rows(old_tokenizer, new_tokenizer)
    rows.of(50265)              # [1, 2, 3]: the mean of these

- A token that the old vocabulary has keeps its row. Tokens are the same when they stand for the same bytes with a
  space before them or without, in any spelling: `Ġgene` of a byte-level BPE, `▁gene` of
  SentencePiece and `gene` of WordPiece are one, and `##gene` is another.
- Special tokens are matched by their role: `[MASK]` is `<mask>`, `[CLS]` is `<s>`.
- A new token gets the mean of the pieces that the old tokenizer cuts its text into (Gee et al., "Fast Vocabulary
  Transfer for Language Model Compression", EMNLP 2022; for added tokens Sachidananda et al., "Efficient Domain
  Adaptation of Language Models via Adaptive Tokenization", 2021).
- One that it has no pieces for gets the mean of all old rows (Hewitt, "Initializing New Word Embeddings for Pretrained
  Language Models", 2021).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from cloze.data.batches.word_boundaries import MARK, byte_alphabet
from cloze.data.tokenizers.token_ids import special_ids, token_names, unknown_id

ROLES = (("mask",), ("pad",), ("unk",), ("cls", "bos"), ("sep", "eos"), ("bos", "cls"), ("eos", "sep"))
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Rows:
    """Old rows of all new tokens in turn, and where those of each begin, [V]; `kinds`: how many tokens were kept, made
    of pieces, or have nothing to be made of."""

    old: torch.Tensor
    starts: torch.Tensor
    kinds: Counter[str]

    def of(self, token: int) -> list[int]:
        """Return the old rows whose mean is a new token's row; an empty list means all rows."""
        end = int(self.starts[token + 1]) if token + 1 < len(self.starts) else len(self.old)
        return [int(row) for row in self.old[int(self.starts[token]) : end]]

    def apply(self, weight: torch.Tensor, axis: int) -> torch.Tensor:
        """Old rows of a weight along its axis of tokens -> those of the new tokens. A row that is copied stays what it
        is to the bit; means are taken in float32."""
        old = weight.movedim(axis, 0)
        flat = old.reshape(old.shape[0], -1)
        single = torch.diff(self.starts, append=torch.tensor([len(self.old)])) == 1
        new = torch.empty(len(self.starts), flat.shape[1], dtype=flat.dtype)
        new[single] = flat[self.old[self.starts[single]]]
        for token in (~single).nonzero().reshape(-1).split(CHUNK):
            lists = [self.of(int(one)) for one in token]
            starts = torch.tensor([0, *(len(one) for one in lists[:-1])]).cumsum(0)
            means = F.embedding_bag(
                torch.tensor([row for one in lists for row in one], dtype=torch.long),
                flat.float() if flat.dtype != torch.float32 else flat,
                starts,
                mode="mean",
            )
            nothing = torch.tensor([not one for one in lists])
            if bool(nothing.any()):
                means[nothing] = flat.float().mean(0)
            new[token] = means.to(flat.dtype)
        return new.reshape(len(self.starts), *old.shape[1:]).movedim(0, axis)


CHUNK = 65_536


def vocabulary_rows(old: Any, new: Any, size: int | None = None) -> Rows:
    """Return the rows of every token of `new`, a tokenizer, in a model that was trained with the tokenizer `old`.

    `size`: number of rows, if larger than the number of tokens (the default).
    """
    roles = special_tokens(old, new)
    old_texts, new_texts = token_texts(old), token_texts(new)
    same = {text: token for token, text in reversed(list(enumerate(old_texts))) if text is not None}
    old_names, new_names = old.get_vocab(), {token: name for name, token in new.get_vocab().items()}
    lists: list[list[int]] = []
    kinds: Counter[str] = Counter()
    unknown = unknown_id(old)
    for token, text in enumerate(new_texts):
        if token in roles:
            rows, kind = [roles[token]], "kept"
        elif text is None:  # special, or added to the vocabulary later
            name = new_names.get(token, "")
            rows = [old_names[name]] if name in old_names else []
            kind = "kept" if rows else "without pieces"
        elif text in same:
            rows, kind = [same[text]], "kept"
        else:
            rows = _pieces(old, text, same, unknown)
            kind = "made of pieces" if rows else "without pieces"
        lists.append(rows)
        kinds[kind] += 1
    lists += [[]] * ((size or 0) - len(lists))
    starts = torch.tensor([0, *(len(rows) for rows in lists[:-1])]).cumsum(0)
    return Rows(torch.tensor([row for rows in lists for row in rows], dtype=torch.long), starts, kinds)


def special_tokens(old: Any, new: Any) -> dict[int, int]:
    """Return new special token -> the old one with the same role."""

    def first(tokenizer: Any, names: tuple[str, ...]) -> int | None:
        found = (getattr(tokenizer, f"{name}_token_id", None) for name in names)
        return next((token for token in found if token is not None), None)

    roles: dict[int, int] = {}
    for names in ROLES:
        here, there = first(new, names), first(old, names)
        if here is not None and there is not None:
            roles.setdefault(here, there)
    return roles


def token_texts(tokenizer: Any) -> list[bytes | None]:
    """Return what each token stands for, in bytes, with a space in front if it begins a word; None for special
    tokens and those that were added to the vocabulary later."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    names = token_names(tokenizer)
    apart = {added["id"] for added in facts.get("added_tokens", [])} | set(special_ids(tokenizer))
    text_of = _spelling(facts)
    return [None if token in apart or not name else text_of(name) for token, name in enumerate(names)]


def _spelling(facts: dict[str, Any]) -> Any:
    """Return how a vocabulary spells its tokens."""
    model = facts.get("model", {})
    if "ByteLevel" in json.dumps([facts.get("pre_tokenizer"), facts.get("decoder")]):
        alphabet = byte_alphabet()

        def read(name: str) -> bytes | None:
            known = all(character in alphabet for character in name)
            return bytes(map(alphabet.__getitem__, name)) if known else None

        return read
    prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    if prefix:
        return lambda name: (name.removeprefix(prefix) if name.startswith(prefix) else f" {name}").encode()
    if suffix:
        return lambda name: name.replace(suffix, " ").encode()
    return lambda name: (
        bytes([int(found.group(1), 16)]) if (found := _BYTE.fullmatch(name)) else name.replace(MARK, " ").encode()
    )


def _pieces(old: Any, text: bytes, same: dict[bytes, int], unknown: int | None) -> list[int]:
    """Return the old tokens that a text is cut into; of bytes that are no text, those of the single bytes."""
    try:
        string = text.decode()
    except UnicodeDecodeError:
        return [same[bytes([byte])] for byte in text if bytes([byte]) in same]
    tokens = old(string, add_special_tokens=False, verbose=False)["input_ids"]
    return [token for token in tokens if token != unknown]
