"""A snapshot of an engine for a checkpoint, and the share that each rank writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cloze import __version__
from cloze.checkpoint.format import FORMAT_VERSION, Position
from cloze.errors import LaunchError
from cloze.training.engines.base import Engine
from cloze.training.engines.sharded_state import Fragment, buffers


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + length) of one tensor of one parameter, as this rank holds them."""

    name: str
    key: str
    offset: int
    tensor: torch.Tensor


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint. `manifest`: rank 0's part of checkpoint.json; `staged`: temporary folder."""

    folder: Path
    staged: Path
    pieces: list[Piece]
    shared: dict[str, dict[str, torch.Tensor]]
    scalars: dict[str, dict[str, float]]
    manifest: dict[str, Any]
    keep: int | None


def share_to_write(held: list[Fragment], engine: Engine) -> list[Fragment]:
    """Return the fragments that this rank writes. If every rank holds everything (DDP, ZeRO-0), each writes some whole
    parameters, balanced by size."""
    if engine.partitioned:
        return held
    load = [0] * engine.world_size
    mine = []
    for fragment in sorted(held, key=lambda f: (-f.length, f.name)):
        writer = load.index(min(load))
        load[writer] += fragment.length
        if writer == engine.rank:
            mine.append(fragment)
    return mine


def frozen_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """Return buffers and parameters that are not trained, whole; those in `engine.frozen` on rank 0 only. Every rank
    calls it."""
    tensors = dict(buffers(engine.module)) | {n: t for n, t in engine.frozen.items() if t is not None}
    parameters = engine.module.named_parameters()
    others = {name: p for name, p in parameters if not p.requires_grad and name not in engine.frozen}
    if others:
        with engine.at_rest():
            tensors |= {name: engine.whole(parameter) for name, parameter in others.items()}
    return tensors


def check_names(engine: Engine) -> None:
    """Raise LaunchError if parameters have names of a wrapper, which the model itself could not load."""
    built = {name for names in engine.group_names for name in names}
    here = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    if built != here:
        example = min(here - built, default=None) or min(built - here)
        raise LaunchError(
            f"the model's parameters have other names than when it was built ({example})",
            where=type(engine.module).__name__,
            hint="something wraps it (torch.compile, a launcher's setting): use --torch_compile",
        )


def describe(engine: Engine, position: Position) -> dict[str, Any]:
    """Return the part of checkpoint.json that is known before anything is written."""
    return {
        "format_version": FORMAT_VERSION,
        "cloze_version": __version__,
        "position": vars(position),
        "world_size": engine.world_size,
        "optimizer": {
            "class": type(engine.inner).__name__,
            "groups": [
                {"params": names, **{k: v for k, v in group.items() if k != "params" and _is_plain(v)}}
                for names, group in zip(engine.group_names, engine.inner.param_groups, strict=True)
            ],
        },
        "parameters": {
            name: {"shape": list(engine.shape_of(p)), "trained": p.requires_grad}
            for name, p in engine.module.named_parameters()
        },
        "tied": dict(getattr(engine.module, "all_tied_weights_keys", None) or {}),
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)
