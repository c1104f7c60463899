"""A pretrained model is trained on blocks of its own tokenizer only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizer_files import BERT_NAMES, digits, saved, words
from tokenizers import Tokenizer
from transformers import BertConfig, BertForMaskedLM

from cloze.config import ModelConfig
from cloze.data.tokenizers.load import load_tokenizer
from cloze.data.tokenizers.own_tokenizer import check_own_tokenizer
from cloze.errors import ModelError
from cloze.model.load import build_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    """Return a model's folder with its own tokenizer, of words."""
    torch.manual_seed(0)
    folder = tmp_path / "pretrained"
    BertForMaskedLM(BertConfig(vocab_size=320, **SIZES)).save_pretrained(folder)
    return saved(folder, *words())


def built(name: str, tokenizer: str) -> None:
    build_model(ModelConfig(model_name_or_path=name), tokenizer, 16, 0)


def without_tokenizer(name: str) -> str:
    for path in Path(name).glob("tokenizer*"):
        path.unlink()
    return name


def changed(folder: Path, change) -> str:
    """Save the tokenizer of words with a vocabulary that `change` (dict -> None) was called with."""
    backend, names = words()
    facts = json.loads(backend.to_str())
    change(facts)
    return saved(folder, Tokenizer.from_str(json.dumps(facts)), names)


def test_its_own_tokenizer_is_taken_without_a_word(pretrained: str, tmp_path: Path, capsys):
    built(pretrained, saved(tmp_path / "same", *words()))
    assert not capsys.readouterr().err


def test_another_tokenizer_is_refused_with_what_to_do(pretrained: str, tmp_path: Path):
    other = saved(tmp_path / "other", *digits())
    with pytest.raises(ModelError) as caught:
        built(pretrained, other)
    line = str(caught.value)
    assert "\n" not in line
    assert "ids stand for other tokens than in the model's own (id 0: '<s>' for '[PAD]')" in line
    assert f"--tokenizer_name {pretrained}" in line
    assert f"`cloze grow {pretrained} --tokenizer" in line


def test_two_tokens_in_each_others_place_are_refused(pretrained: str, tmp_path: Path):
    def swap(facts: dict) -> None:
        vocabulary = facts["model"]["vocab"]
        vocabulary["the"], vocabulary["river"] = vocabulary["river"], vocabulary["the"]

    with pytest.raises(ModelError, match=r"2 of .* ids stand for other tokens"):
        built(pretrained, changed(tmp_path / "swapped", swap))


def test_another_special_token_is_refused(pretrained: str, tmp_path: Path):
    backend, _ = words()
    other = saved(tmp_path / "other", backend, BERT_NAMES | {"pad_token": "[UNK]"})
    with pytest.raises(ModelError, match="pad_token has the id 1, and 0 in the model's"):
        built(pretrained, other)


def test_what_is_no_other_vocabulary_is_a_warning(pretrained: str, tmp_path: Path, capsys):
    def cut_otherwise(facts: dict) -> None:
        facts["normalizer"] = None

    built(pretrained, changed(tmp_path / "cut", cut_otherwise))
    assert "its own tokenizer cuts some texts into other tokens" in capsys.readouterr().err
    tokenizer = load_tokenizer(pretrained)
    tokenizer.add_tokens(["<url>", "<user>"])
    tokenizer.save_pretrained(tmp_path / "more")
    built(pretrained, str(tmp_path / "more"))
    assert "ids that only one of them has" in capsys.readouterr().err


def test_a_placeholder_may_have_got_a_word(pretrained: str, tmp_path: Path):
    def unused(facts: dict) -> None:
        vocabulary = facts["model"]["vocab"]
        vocabulary["[unused7]"] = vocabulary.pop("river")

    name = changed(Path(pretrained), unused)
    check_own_tokenizer(name, BertConfig(), load_tokenizer(saved(tmp_path / "words", *words())))


def test_without_a_tokenizer_ids_of_the_configuration_are_compared(pretrained: str, tmp_path: Path, capsys):
    same, other = saved(tmp_path / "same", *words()), saved(tmp_path / "other", *digits())
    name = without_tokenizer(pretrained)
    built(name, same)
    shown = capsys.readouterr()
    assert f"{name} has no tokenizer to compare with that of the blocks:" in shown.out
    assert not shown.err
    with pytest.raises(ModelError, match=r"the pad_token has the id 1, and 0 in config\.json"):
        built(name, other)


def test_one_that_cannot_be_loaded_is_named(pretrained: str, tmp_path: Path, capsys):
    (Path(pretrained) / "tokenizer.json").write_text("{")
    built(pretrained, saved(tmp_path / "same", *words()))
    assert "its own tokenizer is not compared with that of the blocks" in capsys.readouterr().err
