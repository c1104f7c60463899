"""A tokenizer is what its tokenizer.json says, and whatever is sized by it has room for its largest id."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from repository import MODULES, name_of
from tokenizer_files import ROBERTA_NAMES, TEXTS, digits, saved, words
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, BertTokenizer, CanineTokenizer, PreTrainedTokenizerFast

from cloze.data.batches.collator import MaskingCollator
from cloze.data.batches.masking import Masking
from cloze.data.tokenizers.load import check_sample, describe, fingerprint, load_tokenizer
from cloze.data.tokenizers.select_encoder import choose_encoder
from cloze.data.tokenizers.token_ids import missing_ids, unknown_id, vocabulary_size
from cloze.errors import ModelError


@pytest.mark.parametrize(
    ("make", "class_name"),
    [
        *((words, f"{name}TokenizerFast") for name in ("Bert", "Electra", "Roberta", "DebertaV2", "XLMRoberta")),
        *((digits, f"{name}Tokenizer") for name in ("Roberta", "GPT2")),
    ],
)
def test_a_tokenizer_is_what_its_file_says_whatever_class_its_configuration_names(
    tmp_path: Path, make, class_name: str, capsys
):
    backend, names = make()
    name = saved(tmp_path / "wrong", backend, names, class_name)
    tokenizer = load_tokenizer(name)
    said = capsys.readouterr().err
    assert "tokenizer.json is used as it is" in said
    assert len(said.splitlines()) == 1
    assert fingerprint(tokenizer) == fingerprint(load_tokenizer(saved(tmp_path / "plain", backend, names)))
    texts = ["In 2023 the River", "Café the 1987 lantern", f"a {names['mask_token']} b"]
    assert tokenizer(texts)["input_ids"] == [backend.encode(text).ids for text in texts]
    tokenizer.save_pretrained(tmp_path / "again")
    assert fingerprint(load_tokenizer(str(tmp_path / "again"))) == fingerprint(tokenizer)
    assert not capsys.readouterr().err, "what was saved is loaded as it is"


def test_a_text_of_the_corpus_that_becomes_other_tokens_is_refused(tmp_path: Path):
    """A difference that no text of ours shows: of a letter that only the corpus has."""
    backend, names = digits()
    tokenizer = load_tokenizer(saved(tmp_path / "one", backend, names))
    facts = json.loads((tmp_path / "one" / "tokenizer.json").read_text())
    facts["normalizer"]["normalizers"].append({"type": "Replace", "pattern": {"String": "ꙮ"}, "content": "o"})
    (tmp_path / "one" / "tokenizer.json").write_text(json.dumps(facts))
    check_sample(tokenizer, TEXTS[:1], False)
    with pytest.raises(ModelError, match=r"one: .*tokenizer.json, for 'an ꙮ eye'; write"):
        choose_encoder(tokenizer, "auto", False, ["an ꙮ eye"])


@pytest.mark.parametrize("name", ["roberta-base", "bert-base-uncased"])
def test_real_tokenizers_are_loaded_with_their_own_class(shared_data: Path, name: str, capsys):
    folder = str(shared_data / "tokenizers" / name)
    assert fingerprint(load_tokenizer(folder)) == fingerprint(AutoTokenizer.from_pretrained(folder))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("files", [["vocab.txt"], ["vocab.json", "merges.txt"]])
def test_a_vocabulary_alone_is_one_whole_line_that_says_what_to_do(tmp_path: Path, files: list[str]):
    for file in files:
        (tmp_path / file).write_text("{}" if file.endswith("json") else "[PAD]\n[UNK]\n")
    with pytest.raises(ModelError, match=r"a vocabulary \(.*\) without tokenizer.json .*save_pretrained\(") as caught:
        load_tokenizer(str(tmp_path))
    assert all(file in str(caught.value) for file in files)
    assert "\n" not in str(caught.value)


def test_a_mask_token_that_is_also_another_special_token_is_refused(tmp_path: Path):
    backend, names = words()
    name = saved(tmp_path, backend, names | {"mask_token": "[UNK]"})
    with pytest.raises(ModelError, match=r"the mask token is also the unk_token \('\[UNK\]'\)"):
        load_tokenizer(name)


@pytest.mark.parametrize("limit", [0, -1, "512", True, None])
def test_a_length_that_is_none_is_not_used(tmp_path: Path, limit: object, capsys):
    name = saved(tmp_path, *words())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": limit}))
    assert load_tokenizer(name).model_max_length >= 10**20
    assert ("model_max_length" in capsys.readouterr().err) == (limit is not None)


def with_a_line_twice(folder: Path) -> BertTokenizer:
    """Return the tokenizer of a vocab.txt in which one token stands twice: one id has no token."""
    backend, _ = words()
    lines = [name for name, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1])]
    lines.insert(30, lines[40])
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    BertTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
    return load_tokenizer(str(folder))


def with_a_mask_token_far_above(folder: Path) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose last id is far above its number of tokens."""
    backend, _ = digits()
    facts = json.loads(backend.to_str())
    facts["model"]["vocab"]["<far>"] = 400
    return load_tokenizer(saved(folder, Tokenizer.from_str(json.dumps(facts)), ROBERTA_NAMES))


@pytest.mark.parametrize("make", [with_a_line_twice, with_a_mask_token_far_above])
def test_gaps_between_ids_are_counted_and_never_drawn(tmp_path: Path, make):
    tokenizer = make(tmp_path / "gaps")
    ids = set(tokenizer.get_vocab().values())
    size, missing = vocabulary_size(tokenizer), missing_ids(tokenizer)
    assert size == max(ids) + 1 > len(ids)
    assert missing == sorted(set(range(size)) - ids) != []
    facts = {"tokenizer": describe(tokenizer, "gaps")}
    assert facts["tokenizer"]["vocab_size"] == size
    masking = Masking.from_manifest(json.loads(json.dumps(facts)), 1, 0.9, 0.0, 1.0)
    blocks = np.full((200, 64), max(ids), np.int32)
    input_ids, _ = masking.apply(blocks, np.arange(200))
    assert set(np.unique(input_ids).tolist()) == ids
    assert MaskingCollator(tokenizer).masking.missing_token_ids == tuple(missing)


def test_a_tokenizer_without_gaps_draws_what_it_always_drew():
    manifest = {"tokenizer": {"mask_token_id": 4, "vocab_size": 1000, "special_token_ids": [0, 1, 2, 3, 4]}}
    masking = Masking.from_manifest(manifest, 1, 0.5, 0.0, 1.0)
    drawn = np.array([0, 2**32, 2**63, 2**64 - 1], np.uint64)
    assert masking._replacements(drawn).tolist() == [0, 0, 500, 999]


def test_ids_out_of_proportion_are_refused(tmp_path: Path):
    backend, names = digits()
    facts = json.loads(backend.to_str())
    facts["model"]["vocab"]["<far>"] = 10**7
    tokenizer = load_tokenizer(saved(tmp_path, Tokenizer.from_str(json.dumps(facts)), names))
    with pytest.raises(ModelError, match=r"its largest token id is 10,000,000, but it has \d+ tokens"):
        vocabulary_size(tokenizer)


def test_a_token_that_only_the_configuration_adds_is_no_difference(tmp_path: Path, capsys):
    name = saved(tmp_path, *words())
    path, next_id = tmp_path / "tokenizer_config.json", vocabulary_size(load_tokenizer(name))
    more = {"added_tokens_decoder": {str(next_id): {"content": "<url>", "special": True, "normalized": False}}}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    assert load_tokenizer(name).get_vocab()["<url>"] == next_id
    assert not capsys.readouterr().err


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_sized_by_the_number_of_tokens_and_tokenizers_are_loaded_in_one_place(path: Path):
    for call in calls(path):
        text = ast.unparse(call)
        if isinstance(call.func, ast.Name) and call.func.id == "len":
            assert not ast.unparse(call.args[0]).endswith("tokenizer"), f"{name_of(path)}: {text}"
        if "Tokenizer" in text.split(",")[0] and ast.unparse(call.func).endswith("from_pretrained"):
            assert name_of(path) in ("data/tokenizers/load.py", "data/tokenizers/encoders.py"), text
    attributes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    for node in attributes:
        assert ast.unparse(node) not in ("tokenizer.vocab_size", "self.tokenizer.vocab_size"), name_of(path)


def test_the_unknown_token_is_found_also_if_only_the_model_names_it():
    backend, names = words()
    assert unknown_id(PreTrainedTokenizerFast(tokenizer_object=backend, **names)) == 1
    unnamed = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{kind: name for kind, name in names.items() if kind != "unk_token"}
    )
    assert unnamed.unk_token_id is None
    assert 1 not in unnamed.all_special_ids
    assert unknown_id(unnamed) == 1
    assert describe(unnamed, "x")["special_token_ids"] == [0, 1, 2, 3, 4]
    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    assert unknown_id(PreTrainedTokenizerFast(tokenizer_object=pieces)) == 0
    assert unknown_id(PreTrainedTokenizerFast(tokenizer_object=digits()[0])) is None
    assert unknown_id(PreTrainedTokenizerFast(tokenizer_object=digits()[0], unk_token="<unk>")) == 3
    assert unknown_id(CanineTokenizer()) is None  # written in Python
