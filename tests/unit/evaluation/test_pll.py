"""Pseudo-log-likelihoods: what a slow direct computation and another tool give, whatever the batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import TINY_MODEL
from hypothesis import example, given, settings
from hypothesis import strategies as st
from minicons.scorer import MaskedLMScorer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cloze.config import ModelConfig
from cloze.data.prepared.shards import open_prepared
from cloze.errors import ConfigError, ModelError
from cloze.evaluation.fill_mask import best_words, masked_inputs
from cloze.evaluation.pll import (
    Sentence,
    SentenceScore,
    masked_copies,
    pseudo_perplexity,
    read_sentences,
    score_sentences,
)
from cloze.model.load import build_model
from cloze.model.sparse_head import MaskedHead

TEXTS = ["The Milky Way is a spiral galaxy.", "Stars, planets and moons", "Why is the sky blue?", "antidisestablished"]


@pytest.fixture(scope="module")
def model_and_tokenizer(prepared: Path) -> tuple[Any, Any]:
    data = open_prepared(prepared)
    config = ModelConfig(model_type="roberta", config_overrides=TINY_MODEL[3])
    model, tokenizer = build_model(config, data.tokenizer_dir, data.block_size, seed=1)
    with torch.no_grad():  # far from uniform, so that mistakes show
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.eval(), tokenizer


def directly(model: Any, tokenizer: Any, text: str, word_l2r: bool) -> float:
    """One forward pass for each token, written as the papers say it."""
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids, words, total = encoded["input_ids"], encoded.word_ids(), 0.0
    for place, token in enumerate(ids):
        if encoded["special_tokens_mask"][place]:
            continue
        masked = list(ids)
        for other in range(len(ids)):
            if other == place or (word_l2r and other > place and words[other] == words[place]):
                masked[other] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([masked])).logits[0, place].double()
        total += float(logits.log_softmax(-1)[token])
    return total


def score(model: Any, tokenizer: Any, texts: list[str], batch_size: int, word_l2r: bool) -> list[SentenceScore]:
    head = MaskedHead(model)
    sentences = read_sentences(texts, tokenizer, 512)
    return score_sentences(
        lambda ids, positions: head.logits(model, {"input_ids": ids}, positions),
        sentences,
        tokenizer.mask_token_id,
        batch_size,
        word_l2r,
    )


@pytest.mark.parametrize("word_l2r", [False, True], ids=["pll", "pll_word_l2r"])
def test_it_is_the_direct_computation_in_any_batch(model_and_tokenizer, word_l2r: bool, figure):
    model, tokenizer = model_and_tokenizer
    expected = [directly(model, tokenizer, text, word_l2r) for text in TEXTS]
    for batch_size, texts in ((1, TEXTS), (64, TEXTS), (5, TEXTS + TEXTS)):
        found = score(model, tokenizer, texts, batch_size, word_l2r)
        for number, one in enumerate(found):
            assert one.pll == pytest.approx(expected[number % len(TEXTS)], rel=1e-5)
            figure("pll against a direct computation", abs(one.pll / expected[number % len(TEXTS)] - 1))


def test_a_word_of_many_tokens_is_not_scored_by_its_own_end(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    (sentence,) = read_sentences(["antidisestablished"], tokenizer, 512)
    assert len(set(sentence.word[sentence.scored].tolist())) == 1
    plain, places = masked_copies(sentence, tokenizer.mask_token_id, word_l2r=False)
    later, _ = masked_copies(sentence, tokenizer.mask_token_id, word_l2r=True)
    assert (np.sum(plain == tokenizer.mask_token_id, axis=1) == 1).all()
    count = len(places)
    assert np.sum(later == tokenizer.mask_token_id, axis=1).tolist() == list(range(count, 0, -1))
    plls = [score(model, tokenizer, ["antidisestablished"], 8, l2r)[0].pll for l2r in (False, True)]
    assert plls[0] != plls[1]


VOCABULARY, MASK = 7, 6


def table_logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return logits that depend on all input tokens and their places."""
    places = torch.arange(1, ids.shape[1] + 1)
    shown = ids.reshape(-1)[positions]
    assert (positions // ids.shape[1] == torch.arange(len(ids))).all()
    assert (shown == MASK).all()
    seeds = ((ids + 1) * places**2).sum(1) + positions % ids.shape[1]
    return torch.stack([torch.sin(seeds * (token + 1.0)) * 3 for token in range(VOCABULARY)], dim=1)


def one_by_one(sentence: Sentence, word_l2r: bool) -> float:
    """Return the sum over the scored tokens, each from its own copy of the sentence."""
    total = 0.0
    for place in np.flatnonzero(sentence.scored):
        ids = sentence.ids.copy()
        hidden = [p for p in range(place + 1, len(ids)) if word_l2r and sentence.word[p] == sentence.word[place]]
        ids[[place, *hidden]] = MASK
        logits = table_logits(torch.from_numpy(ids[None]), torch.tensor([int(place)]))[0].double()
        total += float(logits[sentence.ids[place]] - logits.logsumexp(0))
    return total


@st.composite
def sentences(choose: Any) -> Sentence:
    size = choose(st.integers(1, 5))
    scored = np.array(choose(st.lists(st.booleans(), min_size=size, max_size=size)))
    scored[choose(st.integers(0, size - 1))] = True
    ids = np.array(choose(st.lists(st.integers(0, VOCABULARY - 2), min_size=size, max_size=size)), np.int64)
    word = np.cumsum(choose(st.lists(st.integers(0, 1), min_size=size, max_size=size))).astype(np.int64)
    return Sentence(ids, scored, np.where(scored, word, -1 - np.arange(size)))


LONELY = Sentence(np.array([3]), np.array([True]), np.array([0]))  # one token
FRAMED = Sentence(np.array([0, 1, 2, 3, 4]), np.array([False, True, True, True, False]), np.array([-1, 0, 0, 1, -5]))


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.lists(sentences(), min_size=1, max_size=5), st.integers(1, 6), st.booleans())
@example(given=[LONELY], batch_size=1, word_l2r=True)
@example(given=[FRAMED, LONELY, FRAMED], batch_size=3, word_l2r=True)  # a batch ends with a sentence
@example(given=[FRAMED, FRAMED], batch_size=4, word_l2r=False)
@example(given=[FRAMED] * 2, batch_size=6, word_l2r=True)
def test_a_score_depends_on_the_sentence_only(given: list[Sentence], batch_size: int, word_l2r: bool):
    sizes: list[int] = []
    found = score_sentences(table_logits, given, MASK, batch_size, word_l2r, sizes.append)
    if not word_l2r:
        assert score_sentences(table_logits, given, MASK, batch_size) == found  # the default
    assert [one.num_tokens for one in found] == [int(sentence.scored.sum()) for sentence in given]
    expected = [one_by_one(sentence, word_l2r) for sentence in given]
    assert [one.pll for one in found] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert sum(sizes) == sum(one.num_tokens for one in found)
    assert max(sizes) <= batch_size
    full = {n: sum(int(s.scored.sum()) for s in given if len(s.ids) == n) for n in {len(s.ids) for s in given}}
    assert len(sizes) == sum(-(-count // batch_size) for count in full.values()), "a batch was not filled"


def test_a_sentence_may_be_as_long_as_the_limit(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    ids = tokenizer(TEXTS[0])["input_ids"]
    (sentence,) = read_sentences([TEXTS[0]], tokenizer, len(ids))
    assert sentence.ids.tolist() == ids
    assert sentence.scored.tolist() == [False] + [True] * (len(ids) - 2) + [False]
    with pytest.raises(ConfigError, match=f"sentence 1: {len(ids)} tokens, but the model takes {len(ids) - 1}"):
        read_sentences([TEXTS[0]], tokenizer, len(ids) - 1)


def test_pseudo_perplexity_weighs_tokens_not_sentences():
    scores = [SentenceScore(-2.0, 1), SentenceScore(-4.0, 3)]
    assert pseudo_perplexity(scores) == pytest.approx(np.exp(6.0 / 4))


def test_what_cannot_be_scored_is_named(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    with pytest.raises(ConfigError, match=r"sentence 2: .*tokens, but the model takes 8"):
        read_sentences(["a", "a long sentence with many more words than that"], tokenizer, 8)
    with pytest.raises(ConfigError, match="no token to predict"):
        read_sentences([""], tokenizer, 8)


@pytest.mark.parametrize("metric", ["original", "within_word_l2r"])
def test_minicons_gives_the_same(model_and_tokenizer, tmp_path: Path, metric: str, figure, monkeypatch):
    model, tokenizer = model_and_tokenizer
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # minicons still calls it by the name that transformers 5 has dropped.
    monkeypatch.setattr(type(tokenizer), "batch_encode_plus", type(tokenizer).__call__, raising=False)
    theirs = MaskedLMScorer(str(tmp_path), "cpu")
    expected = theirs.sequence_score(TEXTS, reduction=lambda x: x.sum(0).item(), PLL_metric=metric)
    found = score(model, tokenizer, TEXTS, 64, metric != "original")
    for one, other in zip(found, expected, strict=True):
        assert one.pll == pytest.approx(other, rel=1e-4)
        figure("pll against minicons", abs(one.pll / other - 1))


def test_sentences_of_unknown_tokens_are_named(capsys: pytest.CaptureFixture[str]):
    own = Tokenizer(models.WordLevel({"[UNK]": 0, "known": 1}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]")
    read_sentences(["known known"], tokenizer, 512)
    assert "warning" not in capsys.readouterr().err
    read_sentences(["known known", "ไทย ไทย"], tokenizer, 512)
    assert "50.0 % of the tokens of the sentences are unknown to the tokenizer" in capsys.readouterr().err


def test_pseudo_perplexity_that_overflows_is_infinite():
    assert pseudo_perplexity([SentenceScore(-800.0, 1)]) == float("inf")


def test_logits_that_are_not_finite_are_an_error(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    inputs, rows = masked_inputs(tokenizer, "a <mask> day")
    with pytest.raises(ModelError, match="not finite"):
        best_words(broken, tokenizer, inputs, rows, 1)


def test_without_a_notion_of_words_each_token_is_a_word_of_its_own():
    """A tokenizer in Python does not say which tokens make a word; no later token may be masked then."""

    class Plain:
        is_fast, unk_token_id = False, 3

        def __call__(self, text: str, return_special_tokens_mask: bool, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [0, 7, 8, 9, 2], "special_tokens_mask": [1, 0, 0, 0, 1]}

    (sentence,) = read_sentences(["a b c"], Plain(), None)
    copies, places = masked_copies(sentence, 4, word_l2r=True)
    assert copies.tolist() == [[0, 4, 8, 9, 2], [0, 7, 4, 9, 2], [0, 7, 8, 4, 2]]
    assert places.tolist() == [1, 2, 3]
