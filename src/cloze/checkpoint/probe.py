"""Compare a model's answers with those that the training model gave to a checkpoint's stored batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cloze.errors import CheckpointError
from cloze.model.sparse_head import MaskedHead, check_head
from cloze.utils.closeness import relative_difference

# How far logits may be from the training model's, relative to the largest: rounding of other kernels and batch
# shapes in fp32; in lower precision the training model itself computes with 11 (fp16), 8 (bf16) or 4 (fp8) bits.
TOLERANCE = {"no": 1e-4, "fp16": 2e-2, "bf16": 8e-2, "fp8": 2e-1}


def _answers(
    logits_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], probe: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return logits [K, V] in fp32 on the CPU, block by block. `logits_of`: (ids [1, S], positions [k]) -> [k, V]."""
    ids, rows = probe["input_ids"], probe["rows"]
    size = ids.shape[1]
    found = []
    for block in range(len(ids)):
        own = rows[(rows >= block * size) & (rows < (block + 1) * size)] - block * size
        if len(own):
            found.append(logits_of(ids[block : block + 1], own).float().cpu())
    return torch.cat(found) if found else torch.zeros(0, 0)


def not_finite(probe: dict[str, torch.Tensor], folder: Path) -> CheckpointError | None:
    """Return an error if the training model's own answers were not finite, which nothing can be compared with."""
    if bool(torch.isfinite(probe["logits"]).all()):
        return None
    what = "the training model's answers on the stored batch were not finite"
    return CheckpointError(what, where=folder, hint="its weights cannot be used: take an earlier checkpoint")


def probe_difference(model: Any, probe: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between the model's logits and the stored ones, relative to the largest stored
    one."""
    return relative_difference(_answered(model, probe), probe["logits"])


def probe_loss(model: Any, probe: dict[str, torch.Tensor]) -> float:
    """Mean cross entropy, in nats, of the model's answers on a stored probe."""
    return float(F.cross_entropy(_answered(model, probe), probe["labels"]))


@torch.no_grad()
def _answered(model: Any, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return logits [K, V] of a model that is not being trained."""
    head = MaskedHead(model)
    check_head(head, model, {"input_ids": probe["input_ids"]}, "no")
    return _answers(lambda ids, rows: head.logits(model, {"input_ids": ids}, rows), probe)


def stored_loss(probe: dict[str, torch.Tensor]) -> float:
    """Return the same of the answers that are stored with it: the training model's."""
    return float(F.cross_entropy(probe["logits"], probe["labels"]))
