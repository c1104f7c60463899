"""A grown model knows what the old one knew: its loss is far below that of one that begins from nothing."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
import torch.nn.functional as F
from proteins import ESM, LETTERS, prepare_proteins, sequences, train_esm, write_esm
from ranks import cloze_ranks, in_fresh_process, run_ranks, succeed
from transformers import AutoModelForMaskedLM

from cloze.config import GrowConfig
from cloze.data.prepared.shards import open_prepared
from cloze.data.tokenizers.load import load_tokenizer
from cloze.tools.grow.warm_start import warm_start

WIDE_AND_DEEP = "hidden_size=48,num_attention_heads=3,intermediate_size=96,num_hidden_layers=2"
TWICE = "hidden_size=64,num_attention_heads=4,intermediate_size=128"
M_MMAP_THRESHOLD = -3  # malloc.h


@torch.no_grad()
def loss_of(model: Any, data: Path) -> float:
    """Mean cross entropy of the same masked tokens of validation blocks, in nats."""
    prepared = open_prepared(data)
    blocks = prepared.blocks("validation")
    ids = torch.from_numpy(blocks.read(np.arange(min(64, len(blocks))))).long()
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.15
    inputs = ids.masked_fill(chosen, prepared.manifest["tokenizer"]["mask_token_id"])
    return float(F.cross_entropy(model.eval()(input_ids=inputs).logits[chosen], ids[chosen]))


def from_nothing(folder: Path) -> Any:
    """The same architecture with random weights."""
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(AutoModelForMaskedLM.from_pretrained(folder).config)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`blocks` of proteins, `other` blocks of the same with letters numbered the other way round, and `run`, a tiny
    ESM that has learned from the former."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "proteins.txt").write_text("\n".join(sequences(200)))
    write_esm(folder / "esm")
    write_esm(folder / "esm-other", [*ESM[:4], *reversed(LETTERS), *ESM[-2:]])
    for blocks, tokenizer in (("blocks", "esm"), ("other", "esm-other")):
        prepare_proteins(folder / "proteins.txt", folder / tokenizer, folder / blocks, validation_split_percentage=10)
    succeed(cloze_ranks(train_esm(folder / "blocks", folder / "run"), 1, "single", folder / "log"))
    succeed(cloze_ranks(["consolidate", str(folder / "run")], 1, "single", folder / "log"))
    return folder


def test_a_grown_model_begins_far_below_random_weights(places: Path, tmp_path: Path, figure):
    """What the old one learned, which letters go together, is there before the first step."""
    before = loss_of(AutoModelForMaskedLM.from_pretrained(places / "run" / "model"), places / "blocks")
    assert before < math.log(20) - 0.3
    ways = {
        "function preserving": ("blocks", {"config_overrides": TWICE, "method": "function_preserving"}, 1e-4),
        "another tokenizer": ("other", {"tokenizer": str(places / "esm-other")}, 1e-4),
        "tiled": ("blocks", {"config_overrides": WIDE_AND_DEEP}, 0.5),
    }
    for name, (data, how, allowed) in ways.items():
        warm_start(GrowConfig(source=str(places / "run"), output=str(tmp_path / name), **how))
        warm = loss_of(AutoModelForMaskedLM.from_pretrained(tmp_path / name), places / data)
        cold = loss_of(from_nothing(tmp_path / name), places / data)
        print(name, before, warm, cold)
        figure(f"nats below random weights before the first step, {name}", cold - warm)
        assert warm < before + allowed
        assert warm < cold - 0.4


@pytest.mark.slow
def test_a_grown_model_learns_faster_than_one_from_nothing(places: Path, tmp_path: Path, figure):
    """Ten steps each on two ranks, the same blocks, masks and rates."""
    warm_start(GrowConfig(source=str(places / "run"), output=str(tmp_path / "grown"), config_overrides=WIDE_AND_DEEP))
    from_nothing(tmp_path / "grown").save_pretrained(tmp_path / "random")
    load_tokenizer(str(tmp_path / "grown")).save_pretrained(tmp_path / "random")
    losses = {}
    for name in ("grown", "random"):
        argv = ["train", "--model_name_or_path", str(tmp_path / name), "--dataset_name", str(places / "blocks")]
        argv += ["--max_steps", "10", "--learning_rate", "2e-3", "--per_device_train_batch_size", "8"]
        argv += ["--output_dir", str(tmp_path / f"{name}-run"), "--logging_steps", "5", "--save_strategy", "no"]
        succeed(cloze_ranks(argv, 2, "zero2", tmp_path / "log"))
        lines = (tmp_path / f"{name}-run" / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    print(losses)
    assert all(warm < cold - 0.3 for warm, cold in zip(losses["grown"], losses["random"], strict=True)), losses


def make(folder: str, tokenizer: str, overrides: str) -> None:
    synthetic.make_model(overrides).save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)


def measured(report: str, **how: str) -> None:
    """In a process of its own: write down the bytes that growing took."""
    from cloze.utils.memory import PeakMemory

    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # what is freed goes back to the system
    with PeakMemory() as peak:
        warm_start(GrowConfig(**how))
    Path(report).write_text(json.dumps(peak.grown))


def alone(function: Callable[..., None], folder: Path, how: dict[str, str]) -> None:
    succeed(run_ranks(function, 1, folder / "log", timeout=900, **how))


@pytest.mark.slow
def test_memory_is_that_of_a_few_tensors_not_of_the_model(prepared: Path, tmp_path: Path, figure):
    """From 0.4 to 1.3 GB of weights; the largest tensor that is written has 98 MB."""
    small = "hidden_size=768,num_hidden_layers=12,num_attention_heads=12,intermediate_size=3072,vocab_size=16000"
    how = {"folder": str(tmp_path / "old"), "tokenizer": str(prepared.parent / "tokenizer"), "overrides": small}
    alone(make, tmp_path, how)
    large = "hidden_size=1536,num_attention_heads=24,intermediate_size=4096,num_hidden_layers=16"
    grown = {"source": str(tmp_path / "old"), "output": str(tmp_path / "new"), "config_overrides": large}
    in_fresh_process(alone, measured, tmp_path, {"report": str(tmp_path / "report.json"), **grown})
    peak = json.loads((tmp_path / "report.json").read_text())
    size = sum(file.stat().st_size for file in (tmp_path / "new").glob("*.safetensors"))
    figure("cloze grow, 1.2 GB of weights: MB of memory", peak / 1e6)
    assert size > 1.1e9
    assert peak < 5 * 98e6 + 50e6
