"""Bytes and frequencies of tokens, of every kind of vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from cloze.data.shards import open_prepared
from cloze.data.tokenize import load_tokenizer
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
