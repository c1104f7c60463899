"""Save and load checkpoints: per parameter, not per rank, and there whole or not at all.

    checkpoint-500/
      checkpoint.json             position, optimizer groups, configuration, and where each piece of each tensor lies
      rank-00000.safetensors ...  what each rank wrote, in parallel: pieces of fp32 weights and optimizer tensors
      frozen.safetensors          parameters that are not trained, and buffers
      probe.safetensors           a batch and the training model's logits on it, to check the consolidated model with
      model/                      the model's configuration and tokenizer

Everything is written into `checkpoint-500.tmp`, flushed, described with sizes and checksums in checkpoint.json, and
renamed as the last act: a folder called checkpoint-N is complete. Since pieces are stored by parameter name, offset
and length, any engine at any world size can read them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cloze import __version__
from cloze.distributed import decide, gather_to_main
from cloze.errors import ClozeError
from cloze.files import disk_errors, publish, sync_tree, write_json
from cloze.tensorfile import Entry, write_tensors
from cloze.train import state

FORMAT_VERSION = 1
MANIFEST, FROZEN, PROBE = "checkpoint.json", "frozen.safetensors", "probe.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Position:
    """A run's place in its data: the same on every rank, whatever their number."""

    global_step: int
    samples_seen: int
    tokens_seen: int


@dataclass(frozen=True)
class Training:
    """The live objects that a checkpoint is taken of. `module` is the bare model inside the engine's wrappers."""

    module: torch.nn.Module
    optimizer: Any
    group_names: list[list[str]]
    rank: int
    world_size: int


def checkpoint_path(output_dir: Path, global_step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output_dir / f"checkpoint-{global_step}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [(int(m.group(1)), p) for p in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found) if (path / MANIFEST).is_file()]


def save_checkpoint(
    folder: Path,
    training: Training,
    position: Position,
    probe: dict[str, torch.Tensor],
    save_model_files: Callable[[Path], None],
    extra: dict[str, Any],
) -> None:
    """Write one checkpoint; every rank calls it.

    `probe`: tensors for probe.safetensors (rank 0's are taken). `save_model_files` writes the model's configuration
    and tokenizer into a folder. `extra` goes into checkpoint.json as it is. Raises DiskError on every rank where one
    of them cannot write; nothing is left behind then.
    """
    staged = folder.with_name(f"{folder.name}.tmp")
    decide(lambda: _fresh_folder(staged))
    frozen = _frozen_tensors(training)
    problem: ClozeError | None = None
    mine: dict[str, Any] = {}
    try:
        with disk_errors(folder):
            mine = _write_own(staged, training)
            if training.rank == 0:
                mine["files"] |= _write_shared(staged, frozen, probe)
                save_model_files(staged / "model")
    except ClozeError as error:
        problem = error
    parts = gather_to_main((problem, mine))

    def commit() -> None:
        try:
            for error, _ in parts:
                if error is not None:
                    raise error
            with disk_errors(folder):
                write_json(staged / MANIFEST, _manifest(training, position, [part for _, part in parts], extra))
                sync_tree(staged)
                shutil.rmtree(folder, ignore_errors=True)
                publish(staged, folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    decide(commit)


def rotate(output_dir: Path, keep: int | None) -> None:
    """Delete the oldest checkpoints but `keep`; a deletion that is cut short leaves nothing called checkpoint-N."""
    for old in list_checkpoints(output_dir)[: -keep if keep else 0]:
        doomed = old.with_name(f"{old.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _fresh_folder(staged: Path) -> None:
    with disk_errors(staged):
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)


def _write_own(staged: Path, training: Training) -> dict[str, Any]:
    """Write this rank's pieces; return what the manifest says of them."""
    optimizer_state = state.inner_optimizer(training.optimizer).state
    held = state.fragments(training.module, training.optimizer, training.rank)
    entries, pieces = [], []
    for fragment in _share_to_write(held, training):
        for key in [state.WEIGHT, *state.tensor_keys(fragment.owner, optimizer_state)]:
            view = fragment.view(key, optimizer_state)
            name = f"{fragment.name}:{key}"
            entries.append(Entry(name, view.dtype, (fragment.length,), lambda view=view: view))  # type: ignore[misc]
            pieces.append({"name": fragment.name, "key": key, "offset": fragment.offset, "length": fragment.length})
    file = f"rank-{training.rank:05d}.safetensors"
    written = write_tensors(staged / file, entries)
    for entry, piece in zip(entries, pieces, strict=True):
        piece |= {"file": file, "crc32": written.crc32[entry.key]}
    return {
        "files": {file: {"bytes": written.num_bytes, "sha256": written.sha256}},
        "pieces": pieces,
        "scalars": {f.name: state.scalars(f.owner, optimizer_state) for f in held},
    }


def _share_to_write(held: list[state.Fragment], training: Training) -> list[state.Fragment]:
    """Where every rank holds everything (DDP, ZeRO-0), each writes some whole parameters, balanced by size."""
    if state.is_partitioned(training.module):
        return held
    load = [0] * training.world_size
    mine = []
    for fragment in sorted(held, key=lambda f: (-f.length, f.name)):
        writer = load.index(min(load))
        load[writer] += fragment.length
        if writer == training.rank:
            mine.append(fragment)
    return mine


def _frozen_tensors(training: Training) -> dict[str, torch.Tensor]:
    """Buffers and parameters that are not trained: the same on all ranks, whole. Every rank calls it."""
    tensors = dict(state.buffers(training.module))
    for name, parameter in training.module.named_parameters():
        if not parameter.requires_grad:
            tensors[name] = state.whole(parameter)
    return tensors


def _write_shared(staged: Path, frozen: dict[str, torch.Tensor], probe: dict[str, torch.Tensor]) -> dict[str, Any]:
    files = {}
    for file, tensors in ((FROZEN, frozen), (PROBE, probe)):
        entries = [Entry(k, v.dtype, tuple(v.shape), lambda v=v: v) for k, v in sorted(tensors.items())]  # type: ignore[misc]
        written = write_tensors(staged / file, entries)
        files[file] = {"bytes": written.num_bytes, "sha256": written.sha256}
    return files


def _manifest(
    training: Training, position: Position, parts: list[dict[str, Any]], extra: dict[str, Any]
) -> dict[str, Any]:
    numbers: dict[str, dict[str, float]] = {}
    for part in parts:
        numbers |= part["scalars"]
    inner = state.inner_optimizer(training.optimizer)
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
            name: {"shape": list(state.shape_of(p)), "trained": p.requires_grad, "scalars": numbers.get(name, {})}
            for name, p in training.module.named_parameters()
        },
        "tied": dict(getattr(training.module, "all_tied_weights_keys", None) or {}),
        "pieces": [piece for part in parts for piece in part["pieces"]],
        "files": {file: facts for part in parts for file, facts in part["files"].items()},
        **extra,
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)
