"""Sequences of letters, as ESM-2 reads them: a tokenizer without tokenizer.json, whose tokens are characters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from proteins import ESM, prepare_proteins, sequences, train_esm, write_esm
from ranks import cloze_ranks, succeed
from transformers import AutoTokenizer, ByT5Tokenizer

from cloze.data.batches.word_boundaries import words_of
from cloze.data.prepared.shards import open_prepared
from cloze.data.tokenizers.encoders import Encoder, character_table
from cloze.data.tokenizers.select_encoder import choose_encoder, reference
from cloze.errors import ConfigError
from cloze.evaluation.vocabulary import token_bytes


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """esm, the tokenizer, and proteins.txt."""
    folder = tmp_path_factory.mktemp("proteins")
    write_esm(folder / "esm")
    (folder / "proteins.txt").write_text("\n".join(sequences(200)) + "\n")
    return folder


def prepared(places: Path, output: Path, **more) -> Path:
    return prepare_proteins(places / "proteins.txt", places / "esm", output, **more)


def test_every_sequence_becomes_its_letters_between_the_special_tokens(places: Path, tmp_path: Path):
    data = open_prepared(prepared(places, tmp_path / "p", validation_split_percentage=0))
    ids = [
        0 if letter == "(" else 2 if letter == ")" else ESM.index(letter)
        for s in sequences(200)
        for letter in f"({s})"
    ]
    blocks = data.blocks("train")
    assert blocks.read(np.arange(len(blocks))).reshape(-1).tolist() == ids[: len(blocks) * 32]
    assert data.manifest["tokenizer"]["backend"].startswith("characters ")
    assert data.manifest["tokenizer"]["mask_token_id"] == ESM.index("<mask>")


def test_looking_letters_up_gives_the_tokenizers_own_ids(places: Path):
    """Also of what is no letter, of small ones, of spaces, and of the names of special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(places / "esm")
    texts = [*sequences(50), "", "MKT<mask>AY", "mkt", "MK TA\tYI", "MJK", "αMK", "L" * 5000, "<cls>MK<eos>", "B-.ZUO"]
    spec = choose_encoder(tokenizer, "auto", False, sequences(20))
    assert spec.backend == "characters"
    tokens, lengths = Encoder(spec)(texts)
    parts = [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    assert parts == reference(tokenizer, texts, False)


def test_only_where_no_token_is_longer_than_a_letter_is_a_table_enough(places: Path):
    assert character_table(AutoTokenizer.from_pretrained(places / "esm"))[ord("L")] == 4
    vocabulary = dict.fromkeys("ab", 1) | {"ab": 2}
    assert character_table(type("Pairs", (), {"get_vocab": lambda self: vocabulary})()) is None
    assert character_table(ByT5Tokenizer()) is None


def test_a_residue_is_one_byte_although_it_is_shown_with_a_space(places: Path):
    """Bits per byte were half of what they are."""
    tokenizer = AutoTokenizer.from_pretrained(places / "esm")
    sequence = sequences(1)[0]
    assert token_bytes(tokenizer)[tokenizer(sequence)["input_ids"]].sum() == len(sequence)


def test_what_would_make_every_sequence_one_unknown_token_is_one_line(places: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--split_special_tokens: EsmTokenizer"):
        prepared(places, tmp_path / "p", split_special_tokens=True)
    assert not (tmp_path / "p").exists()


def test_proteins_have_no_words_to_mask(places: Path):
    with pytest.raises(ConfigError, match=r"--mask_unit: EsmTokenizer"):
        words_of(AutoTokenizer.from_pretrained(places / "esm"))


def test_esm_learns_from_a_text_file_of_sequences(places: Path, tmp_path: Path):
    """From the file to a model that has seen what there is to learn: the family is told by the letters around."""
    data = prepared(places, tmp_path / "p", validation_split_percentage=10)
    succeed(cloze_ranks(train_esm(data, tmp_path / "run"), 1, "single", tmp_path / "log"))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > math.log(20) - 0.1  # all letters are equally frequent
    assert losses[-1] < math.log(10) + 0.35
