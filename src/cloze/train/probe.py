"""A small batch and the training model's answers on it, stored with every checkpoint.

A run that goes on from the checkpoint, and the consolidated model, have to give the same answers before anyone calls
them done, so that a lost, swapped or stale weight cannot go unnoticed.

    probe = make_probe(blocks, masking)
    tensors = answer_probe(engine, probe)     # input_ids [B, S], rows [K], labels [K], logits [K, V]
    worst = probe_difference(model, tensors)  # largest |difference| of logits / largest |logit|
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from cloze.collectives import agree
from cloze.data.masking import IGNORE_INDEX, Masking
from cloze.errors import CheckpointError
from cloze.foreign.safetensors_header import load_tensors
from cloze.model.compiled import eagerly
from cloze.train.checkpoint_files import PROBE
from cloze.train.engine import Engine

MAX_ROWS = 16
# How far logits may be from the training model's, relative to the largest: rounding of other kernels and batch
# shapes in fp32; in lower precision the training model itself computes with 11 (fp16), 8 (bf16) or 4 (fp8) bits.
TOLERANCE = {"no": 1e-4, "fp16": 2e-2, "bf16": 8e-2, "fp8": 2e-1}


def make_probe(blocks: NDArray[np.int32], masking: Masking) -> dict[str, torch.Tensor]:
    """blocks [B, S] -> input_ids [B, S] with masks, up to 16 masked rows of the flattened batch [K], and what they
    were before, labels [K]."""
    input_ids, labels = masking.for_evaluation().apply(blocks, np.arange(len(blocks), dtype=np.int64))
    rows = np.flatnonzero(labels.reshape(-1) != IGNORE_INDEX)[:MAX_ROWS]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "rows": torch.from_numpy(rows.astype(np.int64)),
        "labels": torch.from_numpy(labels.reshape(-1)[rows]),
    }


@torch.no_grad()
def answer_probe(engine: Engine, probe: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The probe with the model's `logits` [K, V] in fp32; every rank calls it."""
    engine.model.eval()
    with eagerly():
        logits = engine.model(input_ids=probe["input_ids"].to(engine.accelerator.device)).logits
    engine.model.train()
    return {**probe, "logits": _rows(logits, probe["rows"])}


def check_probe(engine: Engine, folder: Path, precision: str) -> float:
    """Let the engine, loaded from a checkpoint, answer the checkpoint's probe; return its loss, in nats.

    `precision`: what the checkpoint was trained in. Every rank calls it. Raises CheckpointError on every rank where
    the loss or the logits are not the stored ones: then something was not loaded (deepspeed issue 6691).
    """
    stored = load_tensors(folder / PROBE)
    answers = answer_probe(engine, stored)
    here, there = stored_loss(answers), stored_loss(stored)
    difference = logits_difference(answers["logits"], stored["logits"])
    allowed = max(TOLERANCE[precision], TOLERANCE[engine.accelerator.mixed_precision])
    problem = None
    if difference > allowed or abs(here - there) > allowed * max(1.0, abs(there)):
        problem = CheckpointError(
            f"the loss on the stored batch is {here:.6f}, but was {there:.6f} when the checkpoint was written",
            where=folder,
            hint="the state was not loaded as it was; please report it with the engine and the architecture",
        )
    agree(problem)
    return here


@torch.no_grad()
def probe_difference(model: torch.nn.Module, probe: dict[str, torch.Tensor]) -> float:
    """Largest difference between the model's logits and the stored ones, relative to the largest stored one."""
    logits = _rows(model(input_ids=probe["input_ids"]).logits, probe["rows"])
    return logits_difference(logits, probe["logits"])


@torch.no_grad()
def probe_loss(model: torch.nn.Module, probe: dict[str, torch.Tensor]) -> float:
    """Mean cross entropy, in nats, of the model's answers on a stored probe."""
    logits = _rows(model(input_ids=probe["input_ids"]).logits, probe["rows"])
    return float(F.cross_entropy(logits, probe["labels"]))


def stored_loss(probe: dict[str, torch.Tensor]) -> float:
    """The same of the answers that are stored with it: the training model's."""
    return float(F.cross_entropy(probe["logits"], probe["labels"]))


def logits_difference(here: torch.Tensor, stored: torch.Tensor) -> float:
    """Largest difference between two [K, V] relative to the largest stored value; infinity for NaN or other shapes."""
    if here.shape != stored.shape or not torch.isfinite(here).all():
        return float("inf")
    scale = float(stored.abs().max()) if stored.numel() else 0.0
    return float((here - stored).abs().max()) / scale if scale else 0.0


def _rows(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return logits.reshape(-1, logits.shape[-1])[rows.to(logits.device)].float().cpu()
