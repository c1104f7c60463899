"""What is decided otherwise where there is a GPU, shown without one: the question for it is answered yes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import TINY_MODEL
from transformers import AutoConfig, AutoModelForMaskedLM

from cloze.config import BenchConfig, TrainConfig
from cloze.data.prepared.shards import open_prepared
from cloze.data.train_data import TrainData
from cloze.model.attention import FLEX_FROM
from cloze.tools.bench.memory import recipe_of, settings_of
from cloze.training import prepare_model


def config(**flags: Any) -> TrainConfig:
    return TrainConfig(output_dir="unused", dataset_name="unused", model_type="roberta", **flags)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """With which `strict` operations were asked to give the same bits."""
    asked: list[bool] = []
    monkeypatch.setattr(prepare_model, "use_same_bits", lambda strict: asked.append(strict))
    return asked


@pytest.mark.parametrize(
    ("flags", "gpu", "expected"),
    [
        ({}, True, [False]),
        ({}, False, []),
        ({"full_determinism": True}, True, [False]),  # strict once the model has been tried
        ({"full_determinism": True}, False, [False]),
        ({"full_determinism": False}, True, []),
    ],
)
def test_bits_are_the_same_every_time_on_a_gpu_unless_it_is_turned_off(
    strict: list[bool], monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], gpu: bool, expected: list[bool]
):
    monkeypatch.setattr(prepare_model, "on_gpu", lambda config: gpu)
    monkeypatch.setattr(prepare_model, "precision_here", lambda config, model_type: ("bf16", None))
    prepare_model.check_start(config(**flags))
    assert strict == expected


@pytest.mark.parametrize(
    ("gpu", "precision", "aligned"), [(True, "bf16", True), (True, "no", False), (False, "bf16", False)]
)
def test_the_output_layer_is_aligned_on_a_gpu_in_half_precision(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, precision: str, aligned: bool
):
    monkeypatch.setattr(prepare_model, "on_gpu", lambda config: gpu)
    monkeypatch.setattr(prepare_model, "precision_here", lambda config, model_type: (precision, None))
    sizes = {name: int(value) for name, value in (one.split("=") for one in TINY_MODEL[3].split(","))}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("roberta", vocab_size=601, **sizes))
    opened = open_prepared(str(prepared))
    data = TrainData(opened.manifest, str(opened.tokenizer_dir), opened.blocks("train"), None)
    head = prepare_model.prepare_model(model, config(), data)
    ids = torch.full((1, 8), 7)
    logits = head.logits(model.eval(), {"input_ids": ids}, torch.tensor([1, 2]))
    assert (logits.stride(0) == 640) is aligned


@pytest.mark.parametrize(("length", "first"), [(32, "sdpa"), (FLEX_FROM, "flex_attention")])
def test_the_length_of_packed_blocks_decides_what_computes_attention(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, length: int, first: str
):
    monkeypatch.setattr(prepare_model, "on_gpu", lambda config: True)
    monkeypatch.setattr(prepare_model, "precision_here", lambda config, model_type: ("bf16", None))
    tried: list[str] = []
    monkeypatch.setattr(prepare_model, "settle_attention", lambda model, names, size, packed: tried.extend(names))
    monkeypatch.setattr(prepare_model, "choose_trained", lambda *_: None)
    model = AutoModelForMaskedLM.from_config(
        AutoConfig.for_model("modernbert", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=32, pad_token_id=1)
    )  # fmt: skip
    manifest = {"block_size": length, "packing": "best_fit"}
    prepare_model.prepare_model(model, config(), TrainData(manifest, "unused", None, None))
    assert tried[0] == first


def test_memory_on_a_gpu_is_measured_with_wider_models_in_bf16():
    narrow, wide = (settings_of("electra", BenchConfig(what="memory", gpu=gpu)) for gpu in (False, True))
    assert (narrow["precision"], wide["precision"]) == ("no", "bf16")
    assert [recipe_of(one).model_config.hidden_size for one in (narrow, wide)] == [512, 768]
    assert [recipe_of(one).model_config.embedding_size for one in (narrow, wide)] == [512, 768]
    assert [recipe_of(one).train.use_cpu for one in (narrow, wide)] == [True, False]
