"""Measure the text of a corpus: unknown tokens, lost characters, empty and repeated documents.

    sketch = TextSketch()                                           # of the documents of one unit
    sketch.add("some text")
    report = text_report(counts, hashes, samples, tokenizer)    # of all units: `cloze.data.prepared.text_report`

Empty documents, unknown tokens and repeated documents are counted over all documents. Documents are compared by a
hash of their text; above 4 million of them, the documents of a share of all hashes are counted instead. Lost
characters and the length of a word are measured on SAMPLED documents, those with the lowest hashes: a random sample
that does not depend on the order of the work. Imports nothing slow: worker processes start with it.
"""

from __future__ import annotations

import heapq
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from cloze.data.batches.word_boundaries import Words, mean_word_length, words_of
from cloze.data.tokenizers.token_ids import unknown_id
from cloze.errors import ConfigError

SAMPLED, SAMPLED_CHARACTERS = 128, 2000  # documents of a split, and characters of each
MAX_HASHES = 2**22
Hashes = NDArray[np.uint64]


class TextSketch:
    """The hashes of some documents, and those with the lowest hashes as a sample."""

    def __init__(self) -> None:
        self._hashes: list[int] = []
        self._lowest: list[tuple[int, str]] = []  # a heap of (-hash, text)
        self._held: set[int] = set()

    def add(self, text: str) -> None:
        """Take one document, not empty."""
        number = xxhash.xxh3_64_intdigest(text.strip().encode("utf-8", "surrogatepass"))
        self._hashes.append(number)
        if number in self._held or (len(self._lowest) == SAMPLED and number > -self._lowest[0][0]):
            return
        self._held.add(number)
        heapq.heappush(self._lowest, (-number, text[:SAMPLED_CHARACTERS]))
        if len(self._lowest) > SAMPLED:
            self._held.remove(-heapq.heappop(self._lowest)[0])

    @property
    def hashes(self) -> Hashes:
        """Return the hash of every document: [n] uint64."""
        return np.array(self._hashes, np.uint64)

    @property
    def sample(self) -> list[tuple[int, str]]:
        """Return the hash and text of the sampled documents, by their hash."""
        return sorted((-number, text) for number, text in self._lowest)


def merge_samples(samples: Iterable[list[tuple[int, str]]]) -> list[str]:
    """Return the sampled texts of all units together."""
    lowest: dict[int, str] = {}
    for sample in samples:
        lowest.update((int(number), text) for number, text in sample)
        lowest = dict(heapq.nsmallest(SAMPLED, lowest.items()))
    return list(lowest.values())


class HashCounts:
    """Counts of hashes, in bounded memory, of a train and a validation split."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Hashes]] = {"train": [], "validation": []}
        self._limit = np.uint64(2**64 - 1)

    def add(self, side: str, hashes: Hashes) -> None:
        """Take the hashes of a unit."""
        self._kept[side].append(hashes[hashes <= self._limit])
        while sum(map(len, self._kept["train"] + self._kept["validation"])) > MAX_HASHES:
            self._limit //= np.uint64(2)
            for kept in self._kept.values():
                kept[:] = [part[part <= self._limit] for part in kept]

    def repeated(self, side: str) -> float:
        """Return the share of documents that repeat another one of their split."""
        whole = self._all(side)
        return (len(whole) - len(np.unique(whole))) / max(1, len(whole))

    def validation_in_train(self) -> float:
        """Return the share of validation documents that are training documents, too."""
        held_out = self._all("validation")
        return float(np.isin(held_out, self._all("train")).sum()) / max(1, len(held_out))

    def _all(self, side: str) -> Hashes:
        return np.concatenate([np.empty(0, np.uint64), *self._kept[side]])


def text_report(
    counts: dict[str, dict[str, int]],
    hashes: HashCounts,
    samples: dict[str, list[str]],
    tokenizer: Any,
    split_special_tokens: bool,
) -> dict[str, Any]:
    """Return the report on the splits in `counts`. `tokenizer`: one of transformers."""
    report: dict[str, Any] = {}
    measure = _measure(tokenizer, split_special_tokens)
    for side, facts in counts.items():
        documents = max(1, facts["documents"])
        report[side] = {
            "documents": facts["documents"],
            "unknown_tokens": _share(facts["unknown_tokens"] / max(1, facts["text_tokens"])),
            "empty_documents": _share(facts["empty_documents"] / documents),
            "repeated_documents": _share(hashes.repeated(side)),
            **measure(samples[side]),
        }
    if counts.get("validation", {}).get("documents"):
        report["validation_in_train"] = _share(hashes.validation_in_train())
    return report


def measure_sample(texts: list[str], tokenizer: Any, split_special_tokens: bool = False) -> dict[str, Any]:
    """Return `lost_characters`, the share that decoding the tokens does not give back, and `word`, the length of the
    word of a token (see `mean_word_length`) in tokens and characters; None if the tokenizer has no notion of a word.
    Also `long_words` of a WordPiece tokenizer.

    Characters are compared without white space, case, and differences that Unicode calls compatible (NFKD).
    """
    return _measure(tokenizer, split_special_tokens)(texts)


def _measure(tokenizer: Any, split_special_tokens: bool) -> Callable[[list[str]], dict[str, Any]]:
    """Return `measure_sample` for one tokenizer, of which the preparation takes longer than any sample."""
    encode, decode = _coder(tokenizer, split_special_tokens)
    words = _words(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)

    def measure(texts: list[str]) -> dict[str, Any]:
        encoded = [encode(text) for text in texts]
        lost = total = 0
        for text, ids in zip(texts, encoded, strict=True):
            before = _characters(text)
            lost += (before - _characters(decode(ids))).total()
            total += before.total()
        length = None if words is None else _word_length(words, encoded, total, tokenizer.mask_token_id)
        found = {"lost_characters": _share(lost / max(1, total)), "word": length}
        return found | _long_words(backend, texts)

    return measure


def sampled_report(texts: list[str], tokenizer: Any, split_special_tokens: bool) -> dict[str, Any]:
    """Return the report on a sample of a corpus that is not read as a whole before training."""
    texts = [text[:SAMPLED_CHARACTERS] for text in texts if text.strip()][:SAMPLED]
    encode, _ = _coder(tokenizer, split_special_tokens)
    ids = [number for text in texts for number in encode(text)]
    unknown = _share(ids.count(unknown_id(tokenizer)) / max(1, len(ids)))
    return {"train": {"unknown_tokens": unknown, **measure_sample(texts, tokenizer, split_special_tokens)}}


def _long_words(backend: Any, texts: list[str]) -> dict[str, float]:
    """Return `long_words`, the share of words that are unknown to WordPiece because of their length; nothing for other
    kinds of tokenizers, which have no such limit."""
    longest = getattr(getattr(backend, "model", None), "max_input_chars_per_word", None)
    if longest is None:
        return {}
    lengths = []
    for text in texts:
        plain = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        words = [(plain, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(plain)
        lengths += [len(word) for word, _ in words]
    return {"long_words": _share(sum(length > longest for length in lengths) / max(1, len(lengths)))}


def _words(tokenizer: Any) -> Words | None:
    try:
        return words_of(tokenizer)
    except ConfigError:
        return None


def _word_length(words: Words, encoded: list[list[int]], characters: int, apart: int) -> dict[str, float]:
    """Return the length of the word of a token in tokens and characters. `apart`: a special token."""
    ids = [number for document in encoded for number in (*document, apart)]
    length = mean_word_length(words, np.array([ids], np.int32), [apart])
    per_token = characters / max(1, len(ids) - len(encoded))
    return {"tokens": round(length, 2), "characters": round(length * per_token, 2)}


def _coder(tokenizer: Any, split_special_tokens: bool) -> tuple[Any, Any]:
    """Return functions from a text to ids without special tokens, and from ids to a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return (
            lambda text: tokenizer(
                text, add_special_tokens=False, verbose=False, split_special_tokens=split_special_tokens
            )["input_ids"],
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        )
    from tokenizers import Tokenizer, decoders

    own = Tokenizer.from_str(backend.to_str())
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = split_special_tokens
    if own.decoder is None and "ByteLevel" in str(own.pre_tokenizer):
        own.decoder = decoders.ByteLevel()
    return lambda text: own.encode(text, add_special_tokens=False).ids, own.decode


def _characters(text: str) -> Counter[str]:
    counts = Counter(unicodedata.normalize("NFKD", text).casefold())
    return Counter({character: count for character, count in counts.items() if not character.isspace()})


def _share(value: float) -> float:
    return round(value, 6)
