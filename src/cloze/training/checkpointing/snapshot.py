"""What is taken of a live engine for a checkpoint, and what of it each rank writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cloze import __version__
from cloze.checkpoint.format import FORMAT_VERSION, Position
from cloze.errors import LaunchError
from cloze.training.engines import sharded_state


@dataclass(frozen=True)
class Training:
    """The live objects that a checkpoint is taken of. `module` is the bare model inside the engine's wrappers.

    `frozen`: fp32 weights of parameters that are not trained, if the engine's own copies are in half precision. Only
    rank 0, which writes them, has the tensors; the names are the same on all ranks."""

    module: torch.nn.Module
    optimizer: Any
    group_names: list[list[str]]
    rank: int
    world_size: int
    frozen: dict[str, torch.Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + length) of one tensor of one parameter, as this rank holds them."""

    name: str
    key: str
    offset: int
    tensor: torch.Tensor


@dataclass(frozen=True)
class Snapshot:
    """All that one rank writes of a checkpoint. `manifest`: what rank 0 knows already of checkpoint.json;
    `staged`: where it is written before it has its name."""

    folder: Path
    staged: Path
    pieces: list[Piece]
    shared: dict[str, dict[str, torch.Tensor]]
    scalars: dict[str, dict[str, float]]
    manifest: dict[str, Any]
    keep: int | None


def share_to_write(held: list[sharded_state.Fragment], training: Training) -> list[sharded_state.Fragment]:
    """Where every rank holds everything (DDP, ZeRO-0), each writes some whole parameters, balanced by size."""
    if sharded_state.is_partitioned(training.module):
        return held
    load = [0] * training.world_size
    mine = []
    for fragment in sorted(held, key=lambda f: (-f.length, f.name)):
        writer = load.index(min(load))
        load[writer] += fragment.length
        if writer == training.rank:
            mine.append(fragment)
    return mine


def frozen_tensors(training: Training) -> dict[str, torch.Tensor]:
    """Return buffers and parameters that are not trained, whole; those in `training.frozen` on rank 0 only. Every rank
    calls it."""
    tensors = dict(sharded_state.buffers(training.module)) | {
        n: t for n, t in training.frozen.items() if t is not None
    }
    parameters = training.module.named_parameters()
    others = {name: p for name, p in parameters if not p.requires_grad and name not in training.frozen}
    if others:
        with sharded_state.at_rest(training.optimizer):
            tensors |= {name: sharded_state.whole(parameter) for name, parameter in others.items()}
    return tensors


def check_names(training: Training) -> None:
    """Check that a checkpoint names parameters as the model itself does, not as a wrapper around it.

    Raises LaunchError: nothing could be loaded from such a checkpoint.
    """
    built = {name for names in training.group_names for name in names}
    here = {name for name, parameter in training.module.named_parameters() if parameter.requires_grad}
    if built != here:
        example = min(here - built, default=None) or min(built - here)
        raise LaunchError(
            f"the model's parameters have other names than when it was built ({example})",
            where=type(training.module).__name__,
            hint="something wraps it (torch.compile, a launcher's setting): use --torch_compile",
        )


def describe(training: Training, position: Position) -> dict[str, Any]:
    """What is known of checkpoint.json before anything is written."""
    inner = sharded_state.inner_optimizer(training.optimizer)
    return {
        "format_version": FORMAT_VERSION,
        "cloze_version": __version__,
        "position": vars(position),
        "world_size": training.world_size,
        "optimizer": {
            "class": type(inner).__name__,
            "groups": [
                {"params": names, **{k: v for k, v in group.items() if k != "params" and _is_plain(v)}}
                for names, group in zip(training.group_names, inner.param_groups, strict=True)
            ],
        },
        "parameters": {
            name: {"shape": list(sharded_state.shape_of(p)), "trained": p.requires_grad}
            for name, p in training.module.named_parameters()
        },
        "tied": dict(getattr(training.module, "all_tied_weights_keys", None) or {}),
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)
