"""A small batch and the training model's answers on it, stored with every checkpoint.

The consolidated model has to give the same answers before anyone calls it done, so that a lost, swapped or stale
weight cannot go unnoticed.

    probe = make_probe(blocks, masking)
    tensors = answer_probe(engine, probe)     # input_ids [B, S], rows [K], logits [K, V]
    worst = probe_difference(model, tensors)  # largest |difference| of logits / largest |logit|
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from cloze.data.masking import IGNORE_INDEX, Masking
from cloze.train.engine import Engine

MAX_ROWS = 16


def make_probe(blocks: NDArray[np.int32], masking: Masking) -> dict[str, torch.Tensor]:
    """blocks [B, S] -> input_ids [B, S] with masks, and up to 16 masked rows of the flattened batch, [K]."""
    input_ids, labels = masking.for_evaluation().apply(blocks, np.arange(len(blocks), dtype=np.int64))
    rows = np.flatnonzero(labels.reshape(-1) != IGNORE_INDEX)[:MAX_ROWS]
    return {"input_ids": torch.from_numpy(input_ids), "rows": torch.from_numpy(rows.astype(np.int64))}


@torch.no_grad()
def answer_probe(engine: Engine, probe: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The probe with the model's `logits` [K, V] in fp32; every rank calls it."""
    engine.model.eval()
    logits = engine.model(input_ids=probe["input_ids"].to(engine.accelerator.device)).logits
    engine.model.train()
    return {**probe, "logits": _rows(logits, probe["rows"])}


@torch.no_grad()
def probe_difference(model: torch.nn.Module, probe: dict[str, torch.Tensor]) -> float:
    """Largest difference between the model's logits and the stored ones, relative to the largest stored one."""
    logits = _rows(model(input_ids=probe["input_ids"]).logits, probe["rows"])
    if logits.shape != probe["logits"].shape or not torch.isfinite(logits).all():
        return float("inf")
    scale = float(probe["logits"].abs().max()) if probe["logits"].numel() else 0.0
    return float((logits - probe["logits"]).abs().max()) / scale if scale else 0.0


def _rows(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return logits.reshape(-1, logits.shape[-1])[rows.to(logits.device)].float().cpu()
