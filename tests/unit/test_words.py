"""Where words begin: as the tokenizer itself has it, for every kind of tokenizer that has words at all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    BertWordPieceTokenizer,
    ByteLevelBPETokenizer,
    CharBPETokenizer,
    SentencePieceUnigramTokenizer,
    Tokenizer,
    models,
    pre_tokenizers,
)
from transformers import AutoTokenizer, ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from cloze.data.backend import NASTY_TEXTS
from cloze.data.train_tokenizer import SPECIAL_TOKENS, as_roberta
from cloze.data.words import Words, words_of
from cloze.errors import ConfigError
from cloze.sample import write_corpus

NAMES = {"unk_token": "<unk>", "mask_token": "<mask>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
KINDS = {
    "byte-level BPE": (ByteLevelBPETokenizer, {}),
    "WordPiece": (BertWordPieceTokenizer, {"unk_token": "<unk>"}),
    "Unigram": (SentencePieceUnigramTokenizer, {}),
    "BPE with a suffix": (CharBPETokenizer, {}),
}
# White space, contractions, classes that change, characters of several tokens.
CONTRACTED = ["it's we'll they'd I'm can't you've we're"] * 50
ODD = [
    "  two  spaces\t\ttabs \r\n\n newlines\n",
    "it's we'll they'd 'quoted' x='s' o''s don’t",
    "rock'n'roll it'sabc we'llama I'md",
    "3.14159 1,000,000 x=y+z; a_b-c/d\\e|f~g B2B 4ever 2½ km² C++ <html>&amp;</html>",
    "漢字とかな交じり文。中文混排，한국어도 있다。 naïve Ångström Привет, мир! שלום",
    "emoji 👍🏽🇩🇪☃️ and text 😀😀 a😀b",
]


def agreement(tokenizer, texts: list[str]) -> tuple[int, int]:
    """Tokens of which `starts` says the same as `word_ids`, and all tokens."""
    words = words_of(tokenizer)
    same = total = 0
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
        numbers = encoded.word_ids()
        expected = [place == 0 or number != numbers[place - 1] for place, number in enumerate(numbers)]
        found = words.starts(np.array([encoded["input_ids"]], np.int32))[0]
        same, total = same + int((found == expected).sum()), total + len(expected)
    return same, total


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("sample") / "corpus.jsonl"
    write_corpus(path, num_threads=150)
    return [" ".join(json.loads(line)["answers"]["text"]) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(sample: list[str]) -> dict[str, PreTrainedTokenizerFast]:
    """A small tokenizer of each kind: words of several tokens, and characters of several bytes."""
    found = {}
    for kind, (make, options) in KINDS.items():
        tokenizer = make(**options)
        train = {"unk_token": "<unk>"} if kind == "Unigram" else {"min_frequency": 2}
        tokenizer.train_from_iterator(
            [*sample, *ODD, *CONTRACTED], vocab_size=700, special_tokens=SPECIAL_TOKENS, show_progress=False, **train
        )
        if kind == "byte-level BPE":
            found[kind] = as_roberta(tokenizer, 512)
        else:
            found[kind] = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **NAMES)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_the_sample_corpus_begin_where_the_tokenizer_has_them_begin(trained, sample, kind, figure):
    same, total = agreement(trained[kind], sample)
    assert total > 5_000
    assert same / total > 0.999
    figure(f"{kind}: share of tokens of the sample corpus whose word start is not the tokenizer's", 1 - same / total)


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_odd_texts_begin_there_too(trained, kind, figure):
    same, total = agreement(trained[kind], ODD)
    assert same / total >= (0.96 if kind == "byte-level BPE" else 1.0)
    figure(f"{kind}: share of tokens of odd texts whose word start is not the tokenizer's", 1 - same / total)


def test_white_space_and_contractions_are_cut_as_the_regular_expression_of_gpt_2_has_it(trained):
    texts = [ODD[0], "a\n\nb \n c\t d  \n", "end \n\n", CONTRACTED[0], "it'sabc we'llama", "12ab34 a1.b"]
    for text in texts:
        same, total = agreement(trained["byte-level BPE"], [text])
        assert same == total, text


@pytest.mark.parametrize("name", ["roberta-base", "bert-base-uncased"])
def test_words_of_real_threads_begin_where_the_real_tokenizers_have_them_begin(shared_data: Path, name: str, figure):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    with gzip.open(shared_data / "eli5_category" / "eli5-category-validation-2.json.gz", "rt") as file:
        threads = json.load(file)[:400]
    same, total = agreement(tokenizer, [" ".join(thread["answers"]["text"]) for thread in threads])
    assert total > 100_000
    assert 1 - same / total <= 1e-5
    figure(f"{name}: share of tokens of ELI5 whose word start is not the tokenizer's", 1 - same / total)
    same, total = agreement(tokenizer, [*ODD, *NASTY_TEXTS[:-2]])
    assert same / total > (0.95 if name == "roberta-base" else 0.9999)
    figure(f"{name}: share of tokens of odd texts whose word start is not the tokenizer's", 1 - same / total)


def test_special_tokens_are_words_and_begin_one(trained):
    """Also where the text goes on in the middle of a word, and where a word is cut by the block's beginning."""
    for kind, tokenizer in trained.items():
        words = words_of(tokenizer)
        ids = tokenizer("planetary", add_special_tokens=False)["input_ids"]
        assert len(ids) > 1
        block = [*ids[1:], tokenizer.eos_token_id, tokenizer.bos_token_id, *ids, tokenizer.mask_token_id, *ids[1:]]
        starts = words.starts(np.array([block, block], np.int32))
        inside = [True] + [False] * (len(ids) - 1)
        assert starts[0].tolist() == [*inside[:-1], True, True, *inside, True, *inside[:-1]], kind
        assert (starts[0] == starts[1]).all()


def test_the_rows_of_a_batch_do_not_depend_on_each_other(trained):
    words = words_of(trained["byte-level BPE"])
    blocks = np.random.default_rng(0).integers(0, 700, (40, 33)).astype(np.int32)
    together = words.starts(blocks)
    assert 0.2 < together.mean() < 0.95
    for row, block in enumerate(blocks):
        assert (words.starts(block[None]) == together[row]).all()
    assert isinstance(words, Words)
    assert words.starts(blocks[:, :1]).all()
    assert words.starts(blocks[:0]).shape == (0, 33)


def character_level() -> PreTrainedTokenizerFast:
    """Characters, with a mark in place of the space: the mark alone makes no words."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, "▁", *"abcdefghij"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)


@pytest.mark.parametrize("make", [ByT5Tokenizer, CanineTokenizer, character_level])
def test_a_tokenizer_without_words_is_refused_in_one_line(make):
    with pytest.raises(
        ConfigError, match=r"^--mask_unit: \w+ has no notion of a word; use --mask_unit token"
    ) as caught:
        words_of(make())
    assert "\n" not in str(caught.value)
