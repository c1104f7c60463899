"""A model that answers fits its tokenizer, can read a text, and has the numbers that its files hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizer_files import saved, words
from transformers import BertConfig, BertForMaskedLM

from cloze.checkpoint.model_path import ModelPath
from cloze.checkpoint.open_model import load_model, open_tokenizer
from cloze.config import EvaluateConfig
from cloze.errors import CheckpointError, ModelError
from cloze.evaluation.evaluate import evaluate
from cloze.evaluation.fill_mask import fill
from cloze.model.weights import load_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    backend, names = words()
    saved(tmp_path / "model", backend, names)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=backend.get_vocab_size(), **sizes)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path, line: str) -> None:
    """Fill a mask and score a sentence; each must give the line."""
    sentences = folder.parent / "sentences.txt"
    sentences.write_text("the star\n")
    scoring = EvaluateConfig(model=str(folder), metric="pll", sentences=str(sentences), use_cpu=True)
    for use in (lambda: fill(str(folder), "the [MASK]", 1), lambda: evaluate(scoring)):
        with pytest.raises(ModelError, match=line) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_padding_token_with_another_id_in_the_configuration_is_refused(folder: Path):
    assert fill(str(folder), "the [MASK]", 1)
    change_config(folder, pad_token_id=5)
    refused(folder, r"model: the pad_token has the id 0, and 5 in config.json")


def test_a_tokenizer_with_ids_beyond_the_embeddings_is_refused(folder: Path):
    backend, names = words()
    size = backend.get_vocab_size()
    backend = type(backend).from_str(backend.to_str())
    backend.add_tokens(["star", "galaxy"])
    saved(folder, backend, names)
    refused(folder, f"its tokenizer has {backend.get_vocab_size()} ids, and the model has {size} embeddings")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"num_attention_heads": -2}, "num_attention_heads is -2, and a model has at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": [16]}, "hidden_size.* expected int, got list"),
        ({"chunk_size_feed_forward": 7}, "the model cannot read a text .*chunk"),
    ],
)
def test_a_configuration_that_no_text_can_be_read_with_is_one_line(folder: Path, values: dict[str, Any], line: str):
    change_config(folder, **values)
    refused(folder, line)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("on_hub", [False, True])
def test_weights_that_are_no_floating_point_numbers_are_refused(folder: Path, dtype: torch.dtype, on_hub: bool):
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["bert.embeddings.position_ids"] = torch.arange(512)[None]  # as older versions of transformers stored it
    save_file(weights, file, {"format": "pt"})
    load_weights(folder)
    key = "bert.encoder.layer.0.output.dense.bias"
    save_file({**weights, key: weights[key].to(dtype)}, file, {"format": "pt"})
    name, options = str(folder), {}
    if on_hub:
        name, options = in_hub_cache(folder)
    with pytest.raises(ModelError, match=rf"model.safetensors: {key} holds \w+ numbers"):
        load_weights(name, **options)


def in_hub_cache(folder: Path) -> tuple[str, dict[str, Any]]:
    """Move a folder into a cache of the Hub's, and return its name and the options to load it with."""
    cache = folder.parent / "cache"
    snapshot = cache / "models--some--model" / "snapshots" / ("0" * 40)
    blobs, refs = cache / "models--some--model" / "blobs", cache / "models--some--model" / "refs"
    for one in (snapshot, blobs, refs):
        one.mkdir(parents=True)
    (refs / "main").write_text("0" * 40)
    for number, path in enumerate(sorted(folder.iterdir())):
        os.rename(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return "some/model", {"cache_dir": str(cache), "local_files_only": True}


def test_a_checkpoint_that_training_deletes_before_its_files_are_read_is_one_line(tmp_path: Path):
    gone = ModelPath(str(tmp_path / "checkpoint-3"), str(tmp_path / "checkpoint-3" / "model"))
    with pytest.raises(CheckpointError, match="checkpoint-3: was deleted"):
        open_tokenizer(gone)
    with pytest.raises(CheckpointError, match="checkpoint-3: was deleted"):
        load_model(gone.folder, None)
