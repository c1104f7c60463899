"""Pseudo-log-likelihood: how likely a masked language model finds a sentence, token by token.

Every token is predicted from all others (Salazar et al., "Masked Language Model Scoring", ACL 2020). With `word_l2r`
the later tokens of its own word are masked too, so that a rare word of many tokens is not scored by its own end
(Kauf and Ivanova, "A Better Way to Do Masked Language Model Scoring", ACL 2023).

    scores = score_sentences(logits_of, sentences, mask_token_id, batch_size=64)     # one SentenceScore each
    pseudo_perplexity(scores)

Special tokens are in the sentence, but are not scored. Words are those of the tokenizer (`word_ids`); without any, as
in tokenizers written in Python, each token is a word of its own, and both scores are the same.

A sentence of n tokens is n masked copies. Copies of the same length go into one batch, so that nothing is padded and
the result does not depend on the other sentences of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloze.data.prepared.text_report import LIMITS
from cloze.data.tokenizers.token_ids import unknown_id
from cloze.errors import ConfigError
from cloze.evaluation.perplexity import perplexity
from cloze.utils.terminal.console import warn

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sentence:
    """`ids` [S]; `scored` [S], which of them are predicted (special tokens are not); `word` [S], the number of the
    word each belongs to."""

    ids: NDArray[np.int64]
    scored: NDArray[np.bool_]
    word: NDArray[np.int64]


@dataclass(frozen=True)
class SentenceScore:
    """Sum of the log-probabilities (nats) of a sentence's tokens, each from the others, and their number."""

    pll: float
    num_tokens: int


def read_sentences(lines: Sequence[str], tokenizer: Any, limit: int | None) -> list[Sentence]:
    """Encode texts, special tokens added; warn of tokens that are unknown to the tokenizer. Raises ConfigError for one
    that is longer than `limit` tokens, or empty."""
    found = []
    unknown = 0
    for number, line in enumerate(lines, 1):
        encoded = tokenizer(line, return_special_tokens_mask=True, verbose=False)
        ids = np.array(encoded["input_ids"], np.int64)
        if limit is not None and len(ids) > limit:
            raise ConfigError(
                f"{len(ids)} tokens, but the model takes {limit}",
                where=f"sentence {number}",
                hint="cut it, or leave it out",
            )
        scored = np.array(encoded["special_tokens_mask"]) == 0
        if not scored.any():
            raise ConfigError("no token to predict", where=f"sentence {number}", hint="leave it out")
        unknown += int((ids[scored] == unknown_id(tokenizer)).sum())
        words = encoded.word_ids() if tokenizer.is_fast else [None] * len(ids)
        word = np.array([-1 - place if one is None else one for place, one in enumerate(words)], np.int64)
        found.append(Sentence(ids, scored, word))
    share = unknown / max(1, sum(int(sentence.scored.sum()) for sentence in found))
    if share > LIMITS["unknown_tokens"]:
        warn(f"{100 * share:.1f} % of the tokens of the sentences are unknown to the tokenizer: scores say little")
    return found


def masked_copies(
    sentence: Sentence, mask_token_id: int, word_l2r: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return a copy of the sentence per scored token, with that one masked: ids [N, S], places to predict [N]."""
    places = np.flatnonzero(sentence.scored)
    copies = np.tile(sentence.ids, (len(places), 1))
    copies[np.arange(len(places)), places] = mask_token_id
    if word_l2r:
        later = np.arange(len(sentence.ids))[None, :] > places[:, None]
        same = sentence.word[None, :] == sentence.word[places][:, None]
        copies[later & same] = mask_token_id
    return copies, places


@torch.no_grad()
def score_sentences(
    logits_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    sentences: Sequence[Sentence],
    mask_token_id: int,
    batch_size: int,
    word_l2r: bool = False,
    advance: Callable[[int], None] = lambda amount: None,
) -> list[SentenceScore]:
    """Score sentences. `logits_of`: input_ids [B, S] and flat positions [B], one in each row -> logits [B, V]."""
    sums = [0.0] * len(sentences)
    for chosen in _of_equal_length(sentences):
        for owners, ids, places in _batches(sentences, chosen, mask_token_id, batch_size, word_l2r):
            flat = np.arange(len(ids)) * ids.shape[1] + places
            logits = logits_of(torch.from_numpy(ids), torch.from_numpy(flat)).float()
            targets = np.array([sentences[owner].ids[place] for owner, place in zip(owners, places, strict=True)])
            chances = logits.log_softmax(-1).cpu()[np.arange(len(ids)), targets].double()
            for owner, chance in zip(owners, chances.tolist(), strict=True):
                sums[owner] += chance
            advance(len(ids))
    return [SentenceScore(total, int(sentence.scored.sum())) for total, sentence in zip(sums, sentences, strict=True)]


def _of_equal_length(sentences: Sequence[Sentence]) -> list[list[int]]:
    by_length: dict[int, list[int]] = {}
    for number, sentence in enumerate(sentences):
        by_length.setdefault(len(sentence.ids), []).append(number)
    return [by_length[length] for length in sorted(by_length)]


def _batches(
    sentences: Sequence[Sentence], chosen: list[int], mask_token_id: int, batch_size: int, word_l2r: bool
) -> Iterator[tuple[list[int], NDArray[np.int64], NDArray[np.int64]]]:
    """Yield masked copies of equally long sentences, in batches: sentence numbers, ids [B, S], places [B]."""
    owners: list[int] = []
    ids: list[NDArray[np.int64]] = []
    places: list[int] = []
    for number in chosen:
        copies, found = masked_copies(sentences[number], mask_token_id, word_l2r)
        for copy, place in zip(copies, found, strict=True):
            owners.append(number)
            ids.append(copy)
            places.append(int(place))
            if len(ids) == batch_size:
                yield owners, np.stack(ids), np.array(places)
                owners, ids, places = [], [], []
    if ids:
        yield owners, np.stack(ids), np.array(places)


def pseudo_perplexity(scores: Sequence[SentenceScore]) -> float:
    """Return exp of the mean negative log-probability of a token (PPPL, Salazar et al., 2020, section 2.2), infinity
    if that overflows."""
    return perplexity(-math.fsum(s.pll for s in scores) / sum(s.num_tokens for s in scores))
