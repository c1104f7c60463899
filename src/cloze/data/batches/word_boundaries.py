"""Where words begin in blocks of tokens: tables over a tokenizer's vocabulary, looked up with numpy alone.

    words = words_of(tokenizer)             # ConfigError where the tokenizer has no notion of a word
    words.starts(blocks)                    # [B, S] int32 -> [B, S] bool

A word is what the tokenizer splits a text into before it looks for tokens, as far as its vocabulary shows it:

- a prefix that continues (WordPiece's `##`): every other token begins a word;
- a mark of the beginning (SentencePiece's `▁`): a token with it begins a word;
- a suffix that ends (`</w>`): what follows begins a word;
- byte-level BPE: a leading space begins a word, and so does a change between letters, digits, white space and others,
  as in GPT-2's regular expression (Radford et al., 2019; `tokenizers` calls it ByteLevel), white space and English
  contractions included. Parts of a character are of the kind that most characters which begin like them are.

The first token of a block begins a word, and so do special and added tokens, and what follows them. The unknown token
counts as text, not as a special token.

Scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, ...) have no words in this
sense: whole sentences would be one. There every token begins a word: a character, or what the vocabulary has as one
token. Combining marks stay with the character before them.
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
# The kind of character at an edge of a token. NONE: the middle of one that an earlier token began. BLANK: a space,
# which goes with whatever word comes after it. ALONE: a letter of a script without spaces; MARKS: marks on such a one.
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
    """What each token of a vocabulary says of words, all [V]. `begins`, `ends`: it begins a word, what follows it
    does; `first`, `last`: kinds of the characters at its edges; `lone`: it is one character of white space."""

    begins: Flags
    ends: Flags
    first: Kinds
    last: Kinds
    lone: Flags


@dataclass(frozen=True, eq=False)
class Words:
    """Tokens that say the same of words have the same code: `codes` [V]. `pairs` [K * K]: whether a word begins
    between tokens of two codes. Codes from `lone` on are single characters of white space, which more than two tokens
    have a say on, since tokens of `space` [K] may follow; those from `tail` on are ends of characters only."""

    codes: NDArray[np.uint8]
    pairs: Flags
    space: Flags
    lone: int
    tail: int

    def starts(self, blocks: NDArray[np.int32]) -> Flags:
        """blocks [B, S] of token ids -> [B, S], true where a word begins."""
        code = np.take(self.codes, blocks)
        highest, before = int(code.max(initial=0)), code
        if highest >= self.tail:  # of the kind that the token said which began the character
            at = np.where(code < self.tail, np.arange(code.shape[1]), 0)
            before = np.take_along_axis(code, np.maximum.accumulate(at, axis=1), axis=1)
        starts = np.ones(code.shape, bool)
        starts[:, 1:] = np.take(self.pairs, before[:, :-1] * np.uint16(len(self.space)) + code[:, 1:])
        if highest >= self.lone:  # `\s+(?!\S)|\s+`: before a text the last of several white characters is apart
            here = (code[:, 1:-1] >= self.lone) & (code[:, 1:-1] < self.tail)
            starts[:, 1:-1] |= here & ~np.take(self.space, code[:, 2:])
        return starts


def words_of_edges(edges: Edges) -> Words:
    """The tables that `Words.starts` looks up."""
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
    """Return how many tokens the word of a token has, on average over the tokens of blocks [n, S]; 0.0 without any.

    Special tokens are not counted. Above LONG_WORD masks of whole words differ much from block to block.
    """
    number = np.cumsum(words.starts(blocks), axis=1, dtype=np.int64)
    number += np.arange(len(blocks))[:, None] * (blocks.shape[1] + 1)
    counts = np.bincount(number[~np.isin(blocks, np.array(special_token_ids, np.int32))])
    return float((counts**2).sum() / counts.sum()) if counts.sum() else 0.0


def words_of(tokenizer: Any) -> Words:
    """The word tables of a tokenizer of transformers, by what its own description says, whatever its class is called.

    Raises ConfigError where nothing in its vocabulary tells where words begin.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    tokens = [] if backend is None else [name or "" for name in token_names(tokenizer)]
    apart = {added["id"] for added in facts.get("added_tokens", [])} | set(tokenizer.all_special_ids)
    apart -= {unknown_id(tokenizer)}  # stands for some text, in a word or as one
    make = _kind(facts, tokens)
    if make is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} has no notion of a word",
            where="--mask_unit",
            hint="use --mask_unit token, or the tokenizer of another model",
        )
    edges = make(tokens)
    edges.begins[list(apart)] = edges.ends[list(apart)] = True
    edges.first[list(apart)] = SPACE  # white space before it is at the end of its text
    return words_of_edges(edges)


def _kind(facts: dict[str, Any], tokens: list[str]) -> Callable[[list[str]], Edges] | None:
    """How the tokens of a tokenizer with this description show words; None if they do not."""
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
    # A lone mark is what spaces become where tokens are characters, or where a corpus has hardly any.
    if kind in ("Unigram", "BPE") and marked + spaceless > 1:
        return lambda tokens: _flags(
            tokens, lambda token: token.startswith(MARK), lambda token: False, lambda token: token.removeprefix(MARK)
        )
    return None


def _types(part: Any) -> set[str]:
    """The types of all parts of a tokenizer's pre-tokenizer, nested ones too."""
    if isinstance(part, list):
        return {name for each in part for name in _types(each)}
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))} | _types(part.get("pretokenizers"))


def _flags(
    tokens: list[str], begins: Callable[[str], bool], ends: Callable[[str], bool], text_of: Callable[[str], str]
) -> Edges:
    """Return the edges of tokens whose characters do not matter, but for scripts without spaces."""
    count = len(tokens)
    kinds = np.full((2, count), LETTER, np.uint8)
    for number, text in enumerate(map(text_of, tokens)):
        if not text:  # a mark of the beginning alone goes with what comes after it
            kinds[1, number] = BLANK
        elif not text.isascii():
            first, last = _kind_of(text[0]), _kind_of(text[-1])
            kinds[0, number] = first if first in (ALONE, MARKS) else LETTER
            kinds[1, number] = ALONE if last in (ALONE, MARKS) else LETTER
    flags = np.fromiter(map(begins, tokens), bool, count), np.fromiter(map(ends, tokens), bool, count)
    return Edges(*flags, kinds[0], kinds[1], np.zeros(count, bool))


def _byte_level(tokens: list[str]) -> Edges:
    """The tables of a vocabulary whose tokens are bytes, written as GPT-2 writes them."""
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
    """The character that stands for each byte: itself where it can be seen, else one from U+0100 on (GPT-2)."""
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
    """Return the kind of a character, as `\\p{L}`, `\\p{N}` and `\\s` have it, but for letters and marks of
    SPACELESS."""
    category = unicodedata.category(character)[0]
    if category in "LM" and any(first <= ord(character) <= last for first, last in SPACELESS):
        return ALONE if category == "L" else MARKS
    if category == "Z" or character in "\t\n\v\f\r\x85":
        return SPACE
    return {"L": LETTER, "N": DIGIT}.get(category, OTHER)


def _kind_of_part(raw: bytes) -> int:
    """The kind of most characters whose UTF-8 begins like this; NONE for what cannot begin one."""
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
