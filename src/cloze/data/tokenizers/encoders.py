"""Token ids of many texts at once, by one of four backends that give the same ids.

    encoder = Encoder(spec)                               # spec: EncoderSpec, small and picklable
    tokens, lengths = encoder(["one text", "another"])    # one int32 stream, and the length of each document in it

`gigatoken` (byte-level and SentencePiece BPE, the fastest), `tokenizers` (every fast tokenizer), `characters` (those
of proteins, whose tokens are letters), `transformers` (the rest). Imports none of them before it is used, so that
worker processes start quickly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloze.utils.foreign.pretrained import from_pretrained

BATCH_CHARACTERS = 2**20  # `tokenizers` needs some 50 bytes a character while it works
Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class EncoderSpec:
    """The parts of an encoder. `prefix` and `suffix`: the special tokens around each document.

    `tokenizer`: the JSON of a fast tokenizer, or the folder or name of any other. `split_special_tokens`: text that
    spells a special token is encoded as text.
    """

    backend: str
    tokenizer: str
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    split_special_tokens: bool
    trust_remote_code: bool = False


class Encoder:
    """Encodes batches of documents, each with the tokenizer's own special tokens around it."""

    def __init__(self, spec: EncoderSpec):
        self.spec = spec
        self._encode = BACKENDS[spec.backend](spec)

    def __call__(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Encode texts; return all tokens in one stream [n] int32, and each text's number of tokens [len(texts)]."""
        ids, bare = self._encode(texts)
        before, after = len(self.spec.prefix), len(self.spec.suffix)
        lengths = bare + (before + after)
        stream = np.empty(int(lengths.sum()), np.int32)
        is_text = np.ones(len(stream), bool)
        ends = np.cumsum(lengths)
        for number, token in enumerate(self.spec.prefix):
            stream[ends - lengths + number] = token
            is_text[ends - lengths + number] = False
        for number, token in enumerate(self.spec.suffix):
            stream[ends - after + number] = token
            is_text[ends - after + number] = False
        stream[is_text] = ids
        return stream, lengths


def backend_version(backend: str) -> str:
    """Return the backend and its version for the manifest: `gigatoken 0.10.0`."""
    return f"{backend} {version('transformers' if backend == 'characters' else backend)}"


def batches(texts: list[str], characters: int = BATCH_CHARACTERS) -> list[list[str]]:
    """Cut a list of texts into lists of about `characters` characters."""
    cut: list[list[str]] = [[]]
    held = 0
    for text in texts:
        if held and held + len(text) > characters:
            cut.append([])
            held = 0
        cut[-1].append(text)
        held += len(text)
    return cut


def _gigatoken(spec: EncoderSpec) -> Callable[[list[str]], tuple[Ids, NDArray[np.int64]]]:
    import awkward
    import gigatoken

    source = spec.tokenizer
    if spec.split_special_tokens:
        facts = json.loads(source)
        facts["added_tokens"] = [token for token in facts["added_tokens"] if not token["special"]]
        source = json.dumps(facts)
    tokenizer = gigatoken.Tokenizer.from_json(source)

    def encode(texts: list[str]) -> tuple[Ids, NDArray[np.int64]]:
        layout = awkward.to_layout(awkward.to_packed(tokenizer.encode_batch(texts, parallel=False)))
        return np.asarray(layout.content.data), np.diff(np.asarray(layout.offsets.data))

    return encode


def _tokenizers(spec: EncoderSpec) -> Callable[[list[str]], tuple[Ids, NDArray[np.int64]]]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes share the cores already
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(spec.tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = spec.split_special_tokens

    def encode(texts: list[str]) -> tuple[Ids, NDArray[np.int64]]:
        parts, counts = [np.empty(0, np.int64)], []
        for batch in batches(texts):
            ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
            counts += [len(each) for each in ids]
            parts.append(np.fromiter(chain.from_iterable(ids), np.int64, sum(counts[len(counts) - len(ids) :])))
        return np.concatenate(parts), np.array(counts, np.int64)

    return encode


def _transformers(spec: EncoderSpec) -> Callable[[list[str]], tuple[Ids, NDArray[np.int64]]]:
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, spec.tokenizer, trust_remote_code=spec.trust_remote_code)
    tokenizer.model_max_length = int(1e30)  # documents are cut into blocks later: a long one is no reason to warn

    def encode(texts: list[str]) -> tuple[Ids, NDArray[np.int64]]:
        options = {"split_special_tokens": True} if spec.split_special_tokens else {}
        ids = [tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"] for text in texts]
        counts = np.array([len(each) for each in ids], np.int64)
        return np.fromiter(chain.from_iterable(ids), np.int64, int(counts.sum())), counts

    return encode


def character_table(tokenizer: Any) -> NDArray[np.int32] | None:
    """Return the ids of the ASCII characters that are tokens, [128], -1 for others; None if a text of such characters
    could hold a longer token too, so that it takes more than a look into a table."""
    table = np.full(128, -1, np.int32)
    vocabulary = tokenizer.get_vocab()
    for token, number in vocabulary.items():
        if len(token) == 1 and token.isascii() and not token.isspace():
            table[ord(token)] = number
    longer = (token for token in vocabulary if len(token) > 1 and token.isascii())
    if (table < 0).all() or any(all(table[ord(character)] >= 0 for character in token) for token in longer):
        return None
    return table


def _characters(spec: EncoderSpec) -> Callable[[list[str]], tuple[Ids, NDArray[np.int64]]]:
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, spec.tokenizer, trust_remote_code=spec.trust_remote_code)
    table = character_table(tokenizer)
    if table is None:
        raise ValueError("its tokens are not single characters")
    slowly = _transformers(spec)

    def encode(texts: list[str]) -> tuple[Ids, NDArray[np.int64]]:
        parts: list[Ids] = [np.empty(0, np.int64)]
        for text in texts:
            ids = table[np.frombuffer(text.encode(), np.uint8)] if text.isascii() else None
            parts.append(slowly([text])[0] if ids is None or (ids < 0).any() else ids)
        return np.concatenate(parts), np.array([len(part) for part in parts[1:]], np.int64)

    return encode


BACKENDS = {
    "gigatoken": _gigatoken,
    "tokenizers": _tokenizers,
    "characters": _characters,
    "transformers": _transformers,
}
