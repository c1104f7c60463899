"""A small batch and the training model's logits on it, stored with every checkpoint.

A resumed run and the consolidated model have to reproduce them, so that a lost, swapped or stale weight is noticed.

    probe = make_probe(blocks, masking)
    tensors = answer_probe(engine, head, probe)     # input_ids [B, S], rows [K], labels [K], logits [K, V]
    worst = probe_difference(model, tensors)        # largest |difference| of logits / largest |logit|

Each block has at least one of the K positions, at most MAX_ROWS in all. Blocks are computed one at a time, with the
masked-only head if the architecture allows it: so the probe takes less memory than a training step.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cloze.checkpoint.format import PROBE
from cloze.checkpoint.probe import TOLERANCE, _answers, not_finite, stored_loss
from cloze.data.batches.masking import IGNORE_INDEX, Masking
from cloze.distributed.collectives import raise_on_any_rank
from cloze.errors import CheckpointError
from cloze.model.compiled import eagerly
from cloze.model.sparse_head import MaskedHead
from cloze.training.engines.base import Engine
from cloze.utils.closeness import relative_difference, within
from cloze.utils.foreign.safetensors_header import load_tensors
from cloze.utils.terminal.console import warn

MAX_ROWS = 16


def make_probe(blocks: NDArray[np.int32], masking: Masking) -> dict[str, torch.Tensor]:
    """Return a probe of blocks [B, S]: input_ids [B, S] with masks; rows [K], the positions to predict in the
    flattened batch; labels [K], their tokens before masking.

    1 <= K <= max(MAX_ROWS, B). A block without a drawn position gets a mask in the middle of those that can be masked;
    a block without any of these is predicted unmasked.
    """
    rule = masking.for_evaluation()
    input_ids, labels = rule.apply(blocks, np.arange(len(blocks), dtype=np.int64))
    each, size = max(1, MAX_ROWS // len(blocks)), blocks.shape[1]
    rows = []
    for block, ids in enumerate(blocks):
        drawn = np.flatnonzero(labels[block] != IGNORE_INDEX)
        if not len(drawn):
            usable = np.flatnonzero(~np.isin(ids, rule.special_token_ids))
            drawn = usable[len(usable) // 2 :][:1] if len(usable) else np.array([size // 2])
            if len(usable):
                input_ids[block, drawn] = rule.mask_token_id
        picked = np.linspace(0, len(drawn) - 1, min(each, len(drawn))).astype(np.int64)
        rows.append(block * size + drawn[picked])
    flat = np.concatenate(rows)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "rows": torch.from_numpy(flat.astype(np.int64)),
        "labels": torch.from_numpy(blocks.reshape(-1)[flat].astype(np.int64)),
    }


@torch.no_grad()
def answer_probe(engine: Engine, head: MaskedHead, probe: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the probe with the model's `logits` [K, V] in fp32; every rank calls it."""
    device = engine.accelerator.device
    engine.model.eval()
    with eagerly():
        logits = _answers(
            lambda ids, rows: head.logits(engine.model, {"input_ids": ids.to(device)}, rows.to(device)), probe
        )
    engine.model.train()
    return {**probe, "logits": logits}


def check_probe(engine: Engine, head: MaskedHead, folder: Path, precision: str) -> float:
    """Compare the loaded engine's logits on the checkpoint's probe with the stored ones; return its loss, in nats.

    `precision`: of training when the checkpoint was saved. Every rank calls it. Raises CheckpointError on every rank
    if loss or logits differ: then some weight was not loaded (deepspeed issue 6691).
    """
    stored = load_tensors(folder / PROBE)
    if not len(stored["rows"]):  # a short block of an older version
        warn(f"{folder / PROBE}: holds no masked position, so the model's answers are not compared")
        return 0.0
    answers = answer_probe(engine, head, stored)
    here, there = stored_loss(answers), stored_loss(stored)
    difference = relative_difference(answers["logits"], stored["logits"])
    allowed = max(TOLERANCE[precision], TOLERANCE[engine.accelerator.mixed_precision])
    problem = not_finite(stored, folder)
    if problem is None and not (
        within(difference, allowed) and within(abs(here - there), allowed * max(1.0, abs(there)))
    ):
        problem = CheckpointError(
            f"the loss on the stored batch is {here:.6f}, but was {there:.6f} when the checkpoint was written",
            where=folder,
            hint="the state was not loaded as it was; please report it with the engine and the architecture",
        )
    raise_on_any_rank(problem)
    return here
