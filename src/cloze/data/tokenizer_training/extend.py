"""Add to a pretrained tokenizer the tokens that a corpus of another domain needs most.

    tokenizer, saving = extend_tokenizer(TokenizerConfig(extend="roberta-base", dataset_name=..., output=..., ...))
    saving.before, saving.after        # tokens of the corpus' words

All old tokens keep their ids, and the new ones come after them. How a text is cut changes only where the new tokens
stand:

- BPE continues where it stopped: new merges follow the old ones, so that a word is first cut as before, and
  then neighbouring tokens become one. (A list of added tokens would be matched inside of words, before anything else.)
- Unigram gets the same merges as pieces. A piece is as likely as the two that it is made of together, and a trace
  more, so that it is chosen exactly where those two were.
- WordPiece takes the longest token that a word begins with, so it gets whole words; a word that only begins with one
  is then cut behind it. Words are chosen by what they save when that is counted too.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cloze.config import TokenizerConfig
from cloze.data.corpus.sources import open_corpus
from cloze.data.tokenizer_training.bpe_merges import learn_merges
from cloze.data.tokenizer_training.train import Texts, check_new, train_tokenizer, warn_of_unknown_text
from cloze.data.tokenizer_training.word_counts import count_words
from cloze.data.tokenizers.load import load_tokenizer
from cloze.data.tokenizers.token_ids import token_names
from cloze.errors import ConfigError, DataError, ModelError
from cloze.utils.atomic_files import check_writable, staged_folder

# How much likelier (in nats) a Unigram piece is than the pieces it is made of: less than any two ways to cut a word
# differ in practice, and more than rounding.
TRACE = 1e-4
NEVER = -1e6  # the score of what only fills a place in a Unigram vocabulary
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Saving:
    """Tokens of all words of the corpus `before` and `after`, and how many tokens were `added`."""

    before: int
    after: int
    added: int


def make_tokenizer(config: TokenizerConfig) -> tuple[PreTrainedTokenizerFast, Saving | None]:
    """Train a tokenizer, or extend one if `config.extend` names it; return it, and what the extension saves.

    Raises as `train_tokenizer` and `extend_tokenizer` do, and DiskError.
    """
    check_writable(config.output)
    return (train_tokenizer(config), None) if config.extend is None else extend_tokenizer(config)


def extend_tokenizer(config: TokenizerConfig) -> tuple[PreTrainedTokenizerFast, Saving]:
    """Write the extended tokenizer into `config.output`; return it, and what it saves.

    Raises ConfigError for values that cannot be used, ModelError for a tokenizer that cannot be extended, DataError
    if the corpus yields no new token.
    """
    check_new(Path(config.output))
    tokenizer = load_tokenizer(str(config.extend), token=config.token)
    backend = _backend(tokenizer, config)
    facts = json.loads(backend.to_str())
    corpus = open_corpus(config)
    words = count_words(Texts(corpus, str(config.dataset_name)), partial(_words_of, backend))
    cuts = [(_cut(backend, word), count) for word, count in words.items()]
    add = {"BPE": _add_merges, "Unigram": _add_pieces, "WordPiece": _add_words}[facts["model"]["type"]]
    added = add(facts, tokenizer, cuts, config)
    if not added:
        raise DataError(
            f"there is nothing to add: no pair of known tokens is in it {max(1, config.min_frequency)} times",
            where=config.dataset_name,
            hint="give a larger corpus, "
            + ("a smaller --min_frequency, " * (config.min_frequency > 1))
            + "or train a "
            "tokenizer if this one does not know the text",
        )
    with staged_folder(config.output) as staged:
        tokenizer.save_pretrained(staged)
        text = json.dumps(facts, indent=2, ensure_ascii=False)
        (staged / "tokenizer.json").write_text(text, encoding="utf-8")
        extended = _reloaded(staged, tokenizer, added)
    extended.name_or_path = config.output
    warn_of_unknown_text(corpus, extended)
    after = sum(len(_cut(extended.backend_tokenizer, word)) * count for word, count in words.items())
    return extended, Saving(sum(len(tokens) * count for tokens, count in cuts), after, len(added))


def _backend(tokenizer: Any, config: TokenizerConfig) -> Tokenizer:
    """Return the fast tokenizer of one of the three kinds. Raises ModelError, ConfigError."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} has no tokenizer.json, and cannot be extended",
            where=config.extend,
            hint="only fast tokenizers can: BPE, WordPiece, Unigram",
        )
    kind = json.loads(backend.to_str())["model"]["type"]
    if kind not in ("BPE", "Unigram", "WordPiece"):
        raise ModelError(
            f"a {kind} tokenizer cannot be extended", where=config.extend, hint="BPE, WordPiece and Unigram can"
        )
    if backend.pre_tokenizer is None:
        raise ModelError(
            "it does not cut texts into words first, and cannot be extended",
            where=config.extend,
            hint="train one with --kind instead",
        )
    if config.kind not in ("bpe", kind.lower()):
        raise ConfigError(f"{config.extend} is {kind}", where="--kind", hint="leave it out")
    return backend


def _words_of(backend: Tokenizer, text: str) -> list[str]:
    """Return the words into which the tokenizer splits a text first."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def _cut(backend: Tokenizer, word: str) -> list[str]:
    return [token.value for token in backend.model.tokenize(word)]


def _add_merges(
    facts: dict[str, Any], tokenizer: Any, cuts: list[tuple[list[str], int]], config: TokenizerConfig
) -> dict[str, int]:
    """Put new merges and their tokens into the description of a BPE; return the tokens with their ids."""
    model = facts["model"]
    prefix = model.get("continuing_subword_prefix") or ""

    def join(one: str, other: str) -> str:
        return one + other.removeprefix(prefix)

    merges = _merges(tokenizer, cuts, config, join)
    added = _numbered(tokenizer, [join(*pair) for pair in merges])
    model["vocab"] |= added
    joined = bool(model["merges"]) and isinstance(model["merges"][0], str)  # "a b", as older files have it
    model["merges"] += [" ".join(pair) if joined else list(pair) for pair in merges]
    return added


def _add_pieces(
    facts: dict[str, Any], tokenizer: Any, cuts: list[tuple[list[str], int]], config: TokenizerConfig
) -> dict[str, int]:
    """Return the same for a Unigram vocabulary: a list, in which the place is the id."""
    vocabulary = facts["model"]["vocab"]
    scores = {piece: score for piece, score in vocabulary}
    merges = _merges(tokenizer, cuts, config, str.__add__, lambda piece: piece in scores)
    for one, other in merges:
        scores[one + other] = scores[one] + scores[other] + TRACE
    added = _numbered(tokenizer, [one + other for one, other in merges])
    names = token_names(tokenizer)[len(vocabulary) :]  # of tokens added to it earlier
    if None in names:
        raise ModelError(
            "its token ids have gaps, and cannot be extended",
            where=config.extend,
            hint="number its tokens from 0 on without gaps",
        )
    vocabulary += [[name, NEVER] for name in names]
    vocabulary += [[piece, scores[piece]] for piece in added]
    return added


def _merges(
    tokenizer: Any,
    cuts: list[tuple[list[str], int]],
    config: TokenizerConfig,
    join: Callable[[str, str], str],
    known: Callable[[str], bool] = lambda token: True,
) -> list[tuple[str, str]]:
    """Return the merges of tokens of text: without special tokens and single bytes."""
    special = set(tokenizer.all_special_tokens)

    def fit(token: str) -> bool:
        return token not in special and not _BYTE.fullmatch(token) and known(token)

    taken = tokenizer.get_vocab()
    new: set[str] = set()

    def fit_or_new(token: str) -> bool:
        return token in new or fit(token)

    def note(one: str, other: str) -> str:
        new.add(join(one, other))
        return join(one, other)

    return learn_merges(cuts, config.new_tokens, config.min_frequency, taken, note, fit_or_new)


def _add_words(
    facts: dict[str, Any], tokenizer: Any, cuts: list[tuple[list[str], int]], config: TokenizerConfig
) -> dict[str, int]:
    """Put the words that save most into a WordPiece vocabulary; return them with their ids."""
    model = facts["model"]
    vocabulary, prefix, unknown = model["vocab"], model["continuing_subword_prefix"], model["unk_token"]
    words: dict[str, tuple[int, int]] = {}  # cut words -> how often, into how many tokens
    for tokens, count in cuts:
        if len(tokens) > 1 and unknown not in tokens:
            words["".join([tokens[0], *(token.removeprefix(prefix) for token in tokens[1:])])] = count, len(tokens)
    taken = tokenizer.get_vocab()
    ranked = [word for word, (count, _) in words.items() if count >= config.min_frequency and word not in taken]
    ranked.sort(key=lambda word: (-words[word][0] * (words[word][1] - 1), word))
    ordered = sorted(words)

    def saved(word: str) -> int:
        total = 0
        for other in ordered[bisect_left(ordered, word) :]:
            if not other.startswith(word):
                break
            count, pieces = words[other]
            total += count * (pieces - 1 - len(_longest_first(other[len(word) :], vocabulary, prefix)))
        return total

    savings = {word: saved(word) for word in ranked[: 2 * config.new_tokens]}
    best = sorted((word for word in savings if savings[word] > 0), key=lambda word: (-savings[word], word))
    added = _numbered(tokenizer, best[: config.new_tokens])
    vocabulary |= added
    return added


def _longest_first(rest: str, vocabulary: dict[str, int], prefix: str) -> list[str]:
    """Cut the rest of a word as WordPiece does, longest token first; each character without a token counts as one."""
    tokens = []
    while rest:
        end = next((end for end in range(len(rest), 0, -1) if prefix + rest[:end] in vocabulary), 1)
        tokens.append(rest[:end])
        rest = rest[end:]
    return tokens


def _numbered(tokenizer: Any, tokens: list[str]) -> dict[str, int]:
    """Return ids for new tokens, above all existing ids."""
    first = max(tokenizer.get_vocab().values()) + 1
    return {token: first + place for place, token in enumerate(tokens)}


def _reloaded(folder: Path, old: Any, added: dict[str, int]) -> Any:
    """Load the tokenizer again and return it. Raises ModelError if it is not the old one with the new tokens."""
    found = load_tokenizer(str(folder))
    if (
        found.get_vocab() != {**old.get_vocab(), **added}
        or found.mask_token_id != old.mask_token_id
        or found.all_special_ids != old.all_special_ids
    ):
        raise ModelError(
            f"{type(old).__name__} does not load the new tokens as they were written",
            where=old.name_or_path,
            hint="please report it with the tokenizer's name",
        )
    return found
