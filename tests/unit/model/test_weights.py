"""No weight is made up or left out without a word, wherever a model is loaded."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import BERT, TINY
from repository import MODULES, name_of
from safetensors.torch import load_file, save_file
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from cloze.checkpoint.model_path import resolve_model_path
from cloze.config import ModelConfig
from cloze.errors import ModelError
from cloze.model.load import build_model, load_checked, load_pretrained
from cloze.model.weights import load_weights

ARCHITECTURES = sorted(config.model_type for config in MODEL_FOR_MASKED_LM_MAPPING)
ALWAYS = {"bert", "roberta", "modernbert", "deberta-v2", "esm"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def model() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=50, **SIZES)).eval()


def change_weights(folder: Path, change) -> None:
    """Write the weights of a folder again, as `change` (dict -> dict) makes them."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_whole_model_is_loaded_without_a_word(model, tmp_path: Path, capsys):
    model.save_pretrained(tmp_path)
    loaded = load_weights(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    load_checked(tmp_path)
    change_weights(tmp_path, lambda weights: {**weights, "bert.pooler.dense.bias": torch.zeros(16)})
    load_weights(tmp_path)
    assert not capsys.readouterr().err
    with pytest.raises(ModelError, match=r"unexpected keys: bert\.pooler\.dense\.bias"):
        load_checked(tmp_path)


def test_a_model_without_its_head_is_refused_but_for_training(model, tmp_path: Path, prepared: Path, capsys):
    model.bert.save_pretrained(tmp_path)
    for load in (load_pretrained, load_weights, load_checked):
        with pytest.raises(ModelError, match=r"cls\.predictions\.bias") as caught:
            load(str(tmp_path))
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"without its head .*--model_name_or_path"):
        load_weights(tmp_path)
    capsys.readouterr()
    load_weights(tmp_path, may_lack_head=True)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "it has no cls.predictions.bias, cls.predictions.decoder.bias" in said[0]
    assert "these weights begin at random" in said[0]


def test_training_begins_from_a_model_without_its_head(tmp_path: Path, prepared: Path, capsys):
    torch.manual_seed(0)
    begun = BertForMaskedLM(BertConfig(vocab_size=600, pad_token_id=1, **SIZES))
    begun.bert.save_pretrained(tmp_path / "begun")
    config = ModelConfig(model_name_or_path=str(tmp_path / "begun"))
    built, _ = build_model(config, prepared / "tokenizer", 32, 0)
    assert torch.equal(built.bert.embeddings.word_embeddings.weight, begun.bert.embeddings.word_embeddings.weight)
    assert "these weights begin at random" in capsys.readouterr().err


def test_layers_that_config_and_files_do_not_share_are_refused(model, tmp_path: Path):
    for folder, layers in (("fewer", 1), ("more", 3)):
        model.save_pretrained(tmp_path / folder)
        change_config(tmp_path / folder, num_hidden_layers=layers)
    for more in (False, True):
        with pytest.raises(ModelError, match=r"have bert\.encoder\.layer\.1\..*fewer layers"):
            load_weights(tmp_path / "fewer", may_lack_head=more)
        with pytest.raises(ModelError, match=r"have no bert\.encoder\.layer\.2\."):
            load_weights(tmp_path / "more", may_lack_head=more)
    model.bert.save_pretrained(tmp_path / "backbone")
    change_config(tmp_path / "backbone", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"have encoder\.layer\.1\..*fewer layers"):
        load_weights(tmp_path / "backbone", may_lack_head=True)


def test_weights_of_another_model_are_refused(model, tmp_path: Path):
    model.save_pretrained(tmp_path / "other")
    change_weights(tmp_path / "other", lambda weights: {f"student.{name}": value for name, value in weights.items()})
    with pytest.raises(ModelError, match="its weights are of another model"):
        load_weights(tmp_path / "other", may_lack_head=True)
    model.save_pretrained(tmp_path / "shape")
    change_config(tmp_path / "shape", intermediate_size=48)
    with pytest.raises(ModelError, match=r"other shapes than its config\.json says"):
        load_weights(tmp_path / "shape", may_lack_head=True)


def test_weights_without_a_place_are_named(model, tmp_path: Path, capsys):
    model.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: {**weights, "classifier.bias": torch.zeros(2)})
    load_weights(tmp_path)
    assert "classifier.bias have no place in BertForMaskedLM, and are left out" in capsys.readouterr().err


def test_an_adapter_is_one_line_that_says_how_to_merge_it(tmp_path: Path, prepared: Path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere/base"}')
    config = ModelConfig(model_name_or_path=str(tmp_path))
    for load in (load_weights, resolve_model_path, lambda name: build_model(config, prepared / "tokenizer", 32, 0)):
        with pytest.raises(ModelError, match=r"this is a PEFT adapter.*merge_and_unload\(\)"):
            load(str(tmp_path))


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=() if t in ALWAYS else pytest.mark.slow) for t in ARCHITECTURES]
)
def test_every_architecture_is_whole_after_saving_and_lacks_its_head_without(
    prepared: Path, tmp_path: Path, model_type: str, capsys
):
    config = ModelConfig(model_type=model_type, config_overrides=TINY.get(model_type, BERT))
    model, _ = build_model(config, prepared / "tokenizer", 32, 0)
    model.save_pretrained(tmp_path / "whole")
    capsys.readouterr()
    loaded = load_checked(tmp_path / "whole")
    assert not capsys.readouterr().err
    backbone = getattr(model, model.base_model_prefix)
    backbone.save_pretrained(tmp_path / "backbone")
    ids = torch.randint(5, 600, (1, 32))
    names = [name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")]
    if names:
        with pytest.raises(ModelError, match="saved without its head"):
            load_weights(tmp_path / "backbone")
    else:  # the head is made of the embeddings alone
        loaded = load_weights(tmp_path / "backbone").eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    shutil.rmtree(tmp_path / "whole")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_weights_are_loaded_in_one_place(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained"):
            text = ast.unparse(node)
            assert "Model" not in text.split(",")[0] or name_of(path) == "model/weights.py", f"{name_of(path)}: {text}"


def test_the_loader_uses_safetensors_and_runs_no_code_unasked(model, tmp_path: Path):
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="only safetensors weights are loaded"):
        load_weights(tmp_path)
    assert AutoModelForMaskedLM.from_pretrained(tmp_path) is not None
