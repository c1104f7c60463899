"""Find the beginnings of words in blocks of tokens, with numpy tables over a tokenizer's vocabulary.

    words = words_of(tokenizer)             # ConfigError if the tokenizer has no notion of a word
    words.starts(blocks)                    # [B, S] int32 -> [B, S] bool

A word is a piece of the tokenizer's pre-tokenization, as far as its vocabulary shows it:

- a continuation prefix (WordPiece's `##`): every token without it begins a word;
- a start mark (SentencePiece's `▁`): a token with it begins a word;
- an end suffix (`</w>`): the next token begins a word;
- byte-level BPE: a leading space begins a word, and so does a change between letters, digits, white space and others,
  as in GPT-2's regular expression (Radford et al., 2019; ByteLevel in `tokenizers`), including its rules for white
  space and English contractions. A part of a character has the kind of most characters that begin with its bytes.

The first token of a block, a special or added token, and the token after one begin a word. The unknown token counts as
text, not as a special token.

Scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, ...) have no words in this sense.
There every token begins a word. Combining marks belong to the character before them.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloze.data.tokenizers.token_ids import token_names, unknown_id
from cloze.errors import ConfigError

MARK = "▁"
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
# The kind of character at an edge of a token. NONE: inside a character. BLANK: a space, which belongs to the next
# word. ALONE: a letter of a script without spaces; MARKS: a combining mark of one.
NONE, LETTER, DIGIT, OTHER, ALONE, MARKS, SPACE, BLANK = range(8)
LONG_WORD = 8.0  # tokens: see `mean_word_length`; 1.1 on English with RoBERTa's vocabulary, 2.7 with one of 600 tokens
# First and last code points of scripts without spaces between words.
SPACELESS = (
    (0x0E00, 0x109F),  # Thai, Lao, Tibetan, Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x3005, 0x3007),
    (0x3031, 0x3035),
    (0x3040, 0x312F),  # Hiragana, Katakana, Bopomofo
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0xA4CF),  # Han, Yi
    (0xA980, 0xAADF),  # Javanese, Burmese, Tai Viet (and Cham, which has spaces)
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x1AFF0, 0x1B16F),
    (0x20000, 0x3FFFF),
)
Flags = NDArray[np.bool_]
Kinds = NDArray[np.uint8]


@dataclass(frozen=True)
class Edges:
    """Word properties of the tokens of a vocabulary, all [V]. `begins`, `ends`: the token, or the next one, begins a
    word; `first`, `last`: kinds of its outer characters; `lone`: it is one white space character."""

    begins: Flags
    ends: Flags
    first: Kinds
    last: Kinds
    lone: Flags


@dataclass(frozen=True, eq=False)
class Words:
    """Word tables. Tokens with equal properties share a code: `codes` [V]. `pairs` [K * K]: whether a word begins
    between two codes. Codes from `lone` on are single white space characters, which depend on the next token too, by
    `space` [K]; codes from `tail` on are trailing parts of characters."""

    codes: NDArray[np.uint8]
    pairs: Flags
    space: Flags
    lone: int
    tail: int

    def starts(self, blocks: NDArray[np.int32]) -> Flags:
        """Return which tokens begin a word: blocks [B, S] of token ids -> [B, S]."""
        code = np.take(self.codes, blocks)
        highest, before = int(code.max(initial=0)), code
        if highest >= self.tail:  # they have the kind of the token that began the character
            at = np.where(code < self.tail, np.arange(code.shape[1]), 0)
            before = np.take_along_axis(code, np.maximum.accumulate(at, axis=1), axis=1)
        starts = np.ones(code.shape, bool)
        starts[:, 1:] = np.take(self.pairs, before[:, :-1] * np.uint16(len(self.space)) + code[:, 1:])
        if highest >= self.lone:  # `\s+(?!\S)|\s+`: the last white space before text is separate
            here = (code[:, 1:-1] >= self.lone) & (code[:, 1:-1] < self.tail)
            starts[:, 1:-1] |= here & ~np.take(self.space, code[:, 2:])
        return starts


def words_of_edges(edges: Edges) -> Words:
    """Return the tables for `Words.starts`."""
    columns = edges.last == NONE, edges.lone, edges.first, edges.last, edges.begins, edges.ends
    kinds, codes = np.unique(np.stack(columns, axis=1).astype(np.uint8), axis=0, return_inverse=True)
    tail, lone, first, last, begins, ends = kinds.T
    here, before = first[None, :], last[:, None]
    changes = (here != NONE) & (here != MARKS) & ((here != before) | (here == ALONE)) & (before != BLANK)
    changes &= (here != SPACE) | (before < SPACE)
    pairs = begins[None, :].astype(bool) | ends[:, None].astype(bool) | changes
    return Words(
        codes=codes.reshape(-1).astype(np.uint8),
        pairs=pairs.reshape(-1),
        space=first == SPACE,
        lone=int(((tail | lone) == 0).sum()),  # codes are in the order of their columns
        tail=int((tail == 0).sum()),
    )


def mean_word_length(words: Words, blocks: NDArray[np.int32], special_token_ids: Sequence[int]) -> float:
    """Return the mean number of tokens in a token's word over blocks [n, S], without special tokens; 0.0 if there are
    none. Above LONG_WORD, the number of masked tokens varies much between blocks."""
    number = np.cumsum(words.starts(blocks), axis=1, dtype=np.int64)
    number += np.arange(len(blocks))[:, None] * (blocks.shape[1] + 1)
    counts = np.bincount(number[~np.isin(blocks, np.array(special_token_ids, np.int32))])
    return float((counts**2).sum() / counts.sum()) if counts.sum() else 0.0


def words_of(tokenizer: Any) -> Words:
    """Return the word tables of a transformers tokenizer, from its description, not its class.

    Raises ConfigError if its vocabulary does not show where words begin.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    tokens = [] if backend is None else [name or "" for name in token_names(tokenizer)]
    apart = {added["id"] for added in facts.get("added_tokens", [])} | set(tokenizer.all_special_ids)
    apart -= {unknown_id(tokenizer)}  # the unknown token stands for text
    make = _kind(facts, tokens)
    if make is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} has no notion of a word",
            where="--mask_unit",
            hint="use --mask_unit token, or the tokenizer of another model",
        )
    edges = make(tokens)
    edges.begins[list(apart)] = edges.ends[list(apart)] = True
    edges.first[list(apart)] = SPACE  # white space before it ends the text
    return words_of_edges(edges)


def _kind(facts: dict[str, Any], tokens: list[str]) -> Callable[[list[str]], Edges] | None:
    """Return a function that makes the edges of tokens for a tokenizer's description; None if its tokens show no
    words."""
    model = facts.get("model", {})
    kind, prefix = model.get("type"), model.get("continuing_subword_prefix")
    suffix = model.get("end_of_word_suffix")
    if kind == "BPE" and "ByteLevel" in _types(facts.get("pre_tokenizer")):
        return _byte_level
    if kind in ("WordPiece", "BPE") and prefix and any(token.startswith(prefix) for token in tokens):
        return lambda tokens: _flags(
            tokens,
            lambda token: not token.startswith(prefix),
            lambda token: False,
            lambda token: token.removeprefix(prefix),
        )
    if kind == "BPE" and suffix and any(token.endswith(suffix) for token in tokens):
        return lambda tokens: _flags(
            tokens, lambda token: False, lambda token: token.endswith(suffix), lambda token: token.removesuffix(suffix)
        )
    marked = sum(token.startswith(MARK) for token in tokens)
    spaceless = any(token and _kind_of(token[0]) == ALONE for token in tokens)
    # A lone mark stands for a space if tokens are characters, or if the training corpus had few spaces.
    if kind in ("Unigram", "BPE") and marked + spaceless > 1:
        return lambda tokens: _flags(
            tokens, lambda token: token.startswith(MARK), lambda token: False, lambda token: token.removeprefix(MARK)
        )
    return None


def _types(part: Any) -> set[str]:
    """Return the types of all parts of a pre-tokenizer, nested ones included."""
    if isinstance(part, list):
        return {name for each in part for name in _types(each)}
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))} | _types(part.get("pretokenizers"))


def _flags(
    tokens: list[str], begins: Callable[[str], bool], ends: Callable[[str], bool], text_of: Callable[[str], str]
) -> Edges:
    """Return the edges of tokens whose characters matter only in scripts without spaces."""
    count = len(tokens)
    kinds = np.full((2, count), LETTER, np.uint8)
    for number, text in enumerate(map(text_of, tokens)):
        if not text:  # a lone start mark belongs to the next token
            kinds[1, number] = BLANK
        elif not text.isascii():
            first, last = _kind_of(text[0]), _kind_of(text[-1])
            kinds[0, number] = first if first in (ALONE, MARKS) else LETTER
            kinds[1, number] = ALONE if last in (ALONE, MARKS) else LETTER
    flags = np.fromiter(map(begins, tokens), bool, count), np.fromiter(map(ends, tokens), bool, count)
    return Edges(*flags, kinds[0], kinds[1], np.zeros(count, bool))


def _byte_level(tokens: list[str]) -> Edges:
    """Return the edges for a vocabulary of byte sequences in GPT-2's notation."""
    alphabet, count = byte_alphabet(), len(tokens)
    first, last = np.full(count, OTHER, np.uint8), np.full(count, OTHER, np.uint8)
    begins, ends, lone = np.zeros(count, bool), np.zeros(count, bool), np.zeros(count, bool)
    for number, token in enumerate(tokens):
        if not token or any(character not in alphabet for character in token):
            continue  # an added token
        raw = bytes(map(alphabet.__getitem__, token))
        text = raw.decode("utf-8", "surrogateescape")  # parts of characters become surrogates
        first[number], last[number] = _first_kind(raw, text), _last_kind(raw, text)
        blank = all(_kind_of(character) == SPACE for character in text)
        begins[number] = text[0] == " " and not blank
        lone[number] = blank and len(text) == 1
        ends[number] = text in CONTRACTIONS
        if blank and text[-1] == " ":
            last[number] = BLANK
    return Edges(begins, ends, first, last, lone)


def byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of GPT-2's alphabet: printable bytes are themselves, others U+0100 and up."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


def _is_part(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


def _first_kind(raw: bytes, text: str) -> int:
    return _kind_of_part(raw) if _is_part(text[0]) else _kind_of(text[0])


def _last_kind(raw: bytes, text: str) -> int:
    if not _is_part(text[-1]):
        kind = _kind_of(text[-1])
        return ALONE if kind == MARKS else kind
    leads = [place for place, byte in enumerate(raw) if byte & 0xC0 != 0x80]
    return _kind_of_part(raw[leads[-1] :]) if leads else NONE


@cache
def _kind_of(character: str) -> int:
    r"""Return the kind of a character by `\p{L}`, `\p{N}` and `\s`, with letters and marks of SPACELESS apart."""
    category = unicodedata.category(character)[0]
    if category in "LM" and any(first <= ord(character) <= last for first, last in SPACELESS):
        return ALONE if category == "L" else MARKS
    if category == "Z" or character in "\t\n\v\f\r\x85":
        return SPACE
    return {"L": LETTER, "N": DIGIT}.get(category, OTHER)


def _kind_of_part(raw: bytes) -> int:
    """Return the kind of most characters whose UTF-8 begins with `raw`; NONE if no character does."""
    lead = raw[0]
    if lead < 0xC2 or lead > 0xF4:
        return NONE
    length = 2 + (lead >= 0xE0) + (lead >= 0xF0)
    known = raw[:length]
    if lead == 0xF0 and len(known) == 1:
        return OTHER  # emoji, though rare letters have more code points
    point = lead & (0x7F >> length)
    for byte in known[1:]:
        point = point << 6 | byte & 0x3F
    missing = 6 * (length - len(known))
    points = range(max(point << missing, 0x80), min((point + 1) << missing, 0x110000), max(1, (1 << missing) // 1024))
    kinds = [_kind_of(chr(each)) for each in points if unicodedata.category(chr(each))[0] != "C"]
    return max((LETTER, DIGIT, OTHER, ALONE), key=kinds.count) if kinds else OTHER
