"""Bytes and frequencies of tokens, of every kind of vocabulary."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizer_kinds import KINDS, tokenizer_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cloze.data.prepared.shards import open_prepared
from cloze.data.tokenizers.load import load_tokenizer
from cloze.evaluation.vocabulary import frequency_bands, token_bytes, token_counts, token_facts

TEXTS = ["The Milky Way is a spiral galaxy.", "naïve café, 12.5 km — über 北京 🙂!", "don't   stop\nhere"]


def encoded_bytes(tokenizer, text: str) -> int:
    lengths = token_bytes(tokenizer)
    return int(lengths[tokenizer(text, add_special_tokens=False)["input_ids"]].sum())


def test_byte_level_tokens_have_the_bytes_of_the_text(prepared: Path):
    tokenizer = load_tokenizer(str(open_prepared(prepared).tokenizer_dir))
    for text in TEXTS:
        assert encoded_bytes(tokenizer, text) == len(text.encode())
    assert token_bytes(tokenizer)[tokenizer.all_special_ids].sum() == 0


@pytest.mark.parametrize("name", ["roberta-base", "bert-base-uncased"])
def test_real_tokenizers_have_the_bytes_of_what_they_decode(shared_data: Path, name: str):
    folder = shared_data / "tokenizers" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The Milky Way is a spiral galaxy with unbelievably many stars"
    space = 0 if name == "roberta-base" else 1  # of WordPiece the first word counts a space too
    assert encoded_bytes(tokenizer, text) == len(text.encode()) + space


def test_bands_are_by_frequency(prepared: Path):
    counts = np.zeros(30_000, np.int64)
    counts[7] = 1000
    counts[10_000:10_099] = 500
    counts[20_000:20_900] = 20
    bands = frequency_bands(counts)
    assert bands[7] == 0
    assert (bands[10_000:10_099] == 0).all()
    assert (bands[20_000:20_900] == 1).all()
    assert np.bincount(bands).tolist() == [100, 900, 9_000, 20_000]
    data = open_prepared(prepared)
    blocks = data.blocks("validation")
    counted = token_counts(blocks, 600)
    assert counted.sum() == len(blocks) * data.block_size
    facts = token_facts(load_tokenizer(str(data.tokenizer_dir)), blocks, torch.device("cpu"))
    assert facts.band[int(counted.argmax())] == 0


@pytest.mark.parametrize("size", [1, 99, 100, 101, 999, 1000, 1001, 9999, 10_000, 10_001])
def test_bands_end_after_100_and_1000_and_10000_tokens(size: int):
    counts = np.random.default_rng(size).integers(0, 5, size)  # many are equally frequent
    ranked = sorted(range(size), key=lambda token: (-counts[token], token))
    expected = [sum(place >= end for end in (100, 1000, 10_000)) for place in range(size)]
    assert frequency_bands(counts)[ranked].tolist() == expected


class Rows:
    """Blocks of the given tokens; it records which blocks were read."""

    has_pieces = False

    def __init__(self, ids: np.ndarray):
        self.ids, self.block_size, self.read_rows = ids, ids.shape[1], []

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.read_rows += indices.tolist()
        return self.ids[indices]


@pytest.mark.parametrize("blocks", [1, 8191, 8192, 8193, 16_384])
def test_every_block_is_counted_once(blocks: int):
    rows = Rows(np.arange(2 * blocks, dtype=np.int32).reshape(blocks, 2) % 5)
    assert token_counts(rows, 4).tolist() == [-(-(2 * blocks - token) // 5) for token in range(4)]  # 4 is out of range
    assert rows.read_rows == list(range(blocks))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_have_the_bytes_of_their_words_and_of_one_space_for_each_word(kind: str):
    tokenizer = tokenizer_of(kind)
    lengths = token_bytes(tokenizer)
    for words in product(["a", "b", "ab", "aab", "abba"], repeat=2):
        ids = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
        spaces = 1 if kind == "ByteLevel" else 2
        assert lengths[ids].sum() == len("".join(words)) + spaces, words
    assert not lengths[tokenizer.all_special_ids].any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_added_token_has_the_bytes_of_its_text(kind: str):
    tokenizer = copy.deepcopy(tokenizer_of(kind))
    names = ["naïve", "北京", "new"]
    tokenizer.add_tokens(names)
    space = 1 if kind == "WordPiece" else 0  # its decoder puts one before each word
    found = token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids(names)]
    assert found.tolist() == [len(name.encode()) + space for name in names]


def test_a_token_for_a_byte_is_one_byte():
    """The vocabulary has tokens for bytes beside tokens for text."""
    tokens = ["<unk>", "a", "▁a", "<0xE2>", "<0x41>", "<0x4>"]
    backend = Tokenizer(models.Unigram([(token, -1.0) for token in tokens], unk_id=0, byte_fallback=True))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert token_bytes(tokenizer).tolist() == [0, 1, 2, 1, 1, 5]
