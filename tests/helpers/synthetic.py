"""A checkpoint of a model with random weights as three ranks of ZeRO-3 leave it, of any size: Cloze's and DeepSpeed's.

No training: the files are written by the code that writes them in training (Cloze), or laid out as DeepSpeed lays them
out, without the moments, which consolidation does not read.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from plain_engine import plain_engine

RANKS = 3
SUB_GROUP = 40_000_000  # elements of a rank's flat tensors; DeepSpeed cuts them between parameters


def make_model(overrides: str) -> Any:
    """A roberta with random weights."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    from cloze.model.overrides import apply_overrides, parse_overrides

    config = AutoConfig.for_model("roberta")
    apply_overrides(config, parse_overrides(overrides))
    config.architectures = ["RobertaForMaskedLM"]
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(config, dtype=torch.float32).eval()


def write_own(model: Any, tokenizer: Path, folder: Path) -> None:
    """`folder`: a checkpoint-N of Cloze."""
    from transformers import AutoTokenizer

    from cloze.checkpoint.format import PROBE, Position
    from cloze.training.checkpointing import saver as saving
    from cloze.training.checkpointing.snapshot import Piece, Snapshot, describe, frozen_tensors

    ids = torch.randint(5, 500, (2, 32))
    rows = torch.arange(16)
    with torch.no_grad():
        logits = model(input_ids=ids).logits.reshape(64, -1)[rows].clone()
    probe = {"input_ids": ids, "rows": rows, "labels": ids.reshape(-1)[rows], "logits": logits}
    tok = AutoTokenizer.from_pretrained(tokenizer)

    def save_model_files(path: Path) -> None:
        model.config.save_pretrained(path)
        tok.save_pretrained(path)

    engine = plain_engine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    engine.world_size = RANKS
    extra = {"run": {}, "config": {}, "precision": "no", "loss_scale": None, "evaluation_pending": False}
    parts = []
    for rank in range(RANKS):
        pieces = [
            Piece(name, "weight", offset, part)
            for name, parameter in model.named_parameters()
            for offset, part in [cut(parameter, rank)]
            if part.numel() and parameter.requires_grad
        ]
        manifest = {**describe(engine, Position(1, 1, 1)), **extra}
        shared = {"frozen.safetensors": frozen_tensors(engine), PROBE: probe} if rank == 0 else {}
        snapshot = Snapshot(folder, folder.with_name("staged"), pieces, shared, {}, manifest, None)
        snapshot.staged.mkdir(parents=True, exist_ok=True)
        parts.append((None, saving._write_own(snapshot, rank)))
        if rank == 0:
            parts[0][1]["files"] |= saving._write_shared(snapshot, save_model_files)
    saving._commit(snapshot, parts)


def cut(parameter: torch.Tensor, rank: int) -> tuple[int, torch.Tensor]:
    """Where a rank's part of a parameter begins, and the part, as ZeRO-3 cuts it."""
    flat = parameter.detach().reshape(-1)
    length = -(-flat.numel() // RANKS)
    return rank * length, flat[rank * length : (rank + 1) * length]


def write_zero3(model: Any, folder: Path) -> None:
    """`folder`: with latest, global_step1/ and config/, as DeepSpeed and the user leave them."""
    files = folder / "global_step1"
    files.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    model.config.save_pretrained(folder / "config")
    shapes = OrderedDict((name, parameter.shape) for name, parameter in model.named_parameters())
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    module = {**{name: torch.empty(0) for name in shapes}, **buffers}
    for rank in range(RANKS):
        groups: list[list[torch.Tensor]] = [[]]
        for parameter in model.parameters():
            if sum(part.numel() for part in groups[-1]) > SUB_GROUP:
                groups.append([])
            _, part = cut(parameter, rank)
            padding = -(-parameter.numel() // RANKS) - part.numel()
            groups[-1] += [part, torch.full((padding,), 7.0)]
        flat = [torch.cat(group) for group in groups]
        state = {"zero_stage": 3, "partition_count": RANKS, "fp32_flat_groups": flat}
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": state, "ds_version": "0.19.8"}, files / f"{name}_optim_states.pt")
        described = {"module": module, "buffer_names": list(buffers), "param_shapes": [shapes], "shared_params": {}}
        frozen = {"frozen_param_shapes": {}, "frozen_param_fragments": {}, "ds_version": "0.19.8"}
        torch.save({**described, **frozen}, files / f"{name}_model_states.pt")
        del groups, flat, state
        gc.collect()
