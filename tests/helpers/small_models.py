"""Tiny models of any architecture on blocks of the sample corpus: their batches, losses, gradients and curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import BERT, TINY
from corpus import TINY_MODEL_NO_DROPOUT
from ranks import cloze_ranks, succeed

from cloze.config import ModelConfig
from cloze.data.batches.layout import Layout
from cloze.data.batches.loader import step_batches
from cloze.data.batches.masking import IGNORE_INDEX, Masking
from cloze.data.prepared.shards import open_prepared
from cloze.model.archs import decoder_start
from cloze.model.load import build_model
from cloze.model.packed import model_inputs
from cloze.model.sparse_head import MaskedHead
from cloze.training.loss import masked_loss_sum


def first_batch(prepared: Path, capacity: int = 0, global_step: int = 0) -> dict[str, torch.Tensor]:
    data = open_prepared(prepared)
    masking = Masking.from_manifest(data.manifest, seed=3)
    layout = Layout(4, 1, 0, 1)
    return step_batches(data.blocks("train"), masking, layout, 10**6, global_step, capacity=capacity).micro_batches[0]


def build(prepared: Path, model_type: str) -> Any:
    data = open_prepared(prepared)
    config = ModelConfig(model_type=model_type, config_overrides=TINY.get(model_type, BERT))
    model, _ = build_model(config, data.tokenizer_dir, data.block_size, seed=1)
    with torch.no_grad():  # the first forward of some (big_bird) makes new modules
        model(input_ids=first_batch(prepared)["input_ids"])
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def loss_and_gradients(model: Any, batch: dict[str, torch.Tensor], head: MaskedHead | None) -> tuple[float, dict]:
    """`head`: None for the plain dense forward and torch's own mean, without anything of Cloze."""
    model.zero_grad(set_to_none=True)
    inputs = model_inputs(batch, torch.device("cpu"), None, decoder_start(model.config))
    torch.manual_seed(5)
    if head is None:
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())
    else:
        count = (batch["targets"] != IGNORE_INDEX).sum()
        loss = masked_loss_sum(head.logits(model, inputs, batch["positions"]), batch["targets"]) / count
    loss.backward()
    return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def curve(prepared: Path, folder: Path, engine: str, *more: str) -> np.ndarray:
    argv = ["train", *TINY_MODEL_NO_DROPOUT, "--max_steps", "6", "--logging_steps", "1", "--save_strategy", "no"]
    argv += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3"]
    where = ["--dataset_name", str(prepared), "--output_dir", str(folder / "run")]
    succeed(cloze_ranks([*argv, *where, *more], 2, engine, folder / "log"))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return np.array([(line["loss"], line["grad_norm"]) for line in lines])


def without_dropout() -> None:
    """On a rank: the same numbers whatever the split."""
    functional = torch.nn.functional
    attention = functional.scaled_dot_product_attention
    functional.dropout = lambda x, *_, **__: x
    functional.scaled_dot_product_attention = lambda *a, dropout_p=0.0, **more: attention(*a, **more)


def build_plainly(config, data):
    """The model as every other engine has it, in memory."""
    from cloze.model.flops import undivided
    from cloze.model.load import build_model

    with undivided():
        return build_model(config, data.tokenizer, data.block_size, config.seed)[0]
