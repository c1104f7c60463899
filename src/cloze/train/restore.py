"""Read checkpoints: check that they are whole, find the newest good one, put its state into a live engine.

Pieces are found by parameter name and offset, so the engine and the number of ranks that wrote them do not matter,
and each rank reads its own share plus one tensor at a time.

    folder = find_checkpoint(output_dir, "auto")
    with PieceReader(folder, read_manifest(folder)) as pieces:
        load_state(training, pieces)
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cloze.console import warn
from cloze.errors import CheckpointError
from cloze.files import sha256
from cloze.train import state
from cloze.train.checkpoint import FORMAT_VERSION, FROZEN, MANIFEST, Position, Training, list_checkpoints

_HINT = "use an earlier checkpoint"


def read_manifest(folder: Path) -> dict[str, Any]:
    """checkpoint.json. Raises CheckpointError if it is missing, broken or of a newer format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
        Position(**manifest["position"])
    except FileNotFoundError:
        raise CheckpointError(
            "not a checkpoint: there is no checkpoint.json", where=folder, hint="give a checkpoint-N folder"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError("damaged", where=folder / MANIFEST, hint=_HINT) from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"format {version} is not known here", where=folder, hint="use a newer Cloze")
    return manifest


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Check every file's size and SHA-256; return the manifest. CheckpointError names the first bad file."""
    manifest = read_manifest(folder)
    for name, facts in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError("missing", where=file, hint=_HINT)
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(
                f"{file.stat().st_size} bytes where {facts['bytes']} were written", where=file, hint=_HINT
            )
        if sha256(file) != facts["sha256"]:
            raise CheckpointError("damaged: the checksum is not the one that was written", where=file, hint=_HINT)
    return manifest


def find_checkpoint(output_dir: Path, choice: str) -> Path | None:
    """The checkpoint to go on from: `choice` itself, or with "auto" the newest good one, None if there is none yet.

    Raises CheckpointError where the chosen one is damaged, or all of them are.
    """
    if choice != "auto":
        verify_checkpoint(Path(choice))
        return Path(choice)
    candidates = list_checkpoints(output_dir)
    for folder in reversed(candidates):
        try:
            verify_checkpoint(folder)
            return folder
        except CheckpointError as error:
            warn(f"{error}; trying the checkpoint before")
    if candidates:
        raise CheckpointError("all checkpoints are damaged", where=output_dir, hint="start in another output_dir")
    return None


class PieceReader:
    """Reads any run of elements of any stored tensor. Use it as a context manager: files are mapped, not loaded."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self._files: dict[str, Any] = {}
        self._pieces: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for piece in manifest["pieces"]:
            self._pieces.setdefault((piece["name"], piece["key"]), []).append(piece)

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def keys(self, name: str) -> list[str]:
        """The optimizer's tensors stored for a parameter."""
        return sorted(key for other, key in self._pieces if other == name and key != state.WEIGHT)

    def read(self, name: str, key: str, offset: int = 0, length: int | None = None) -> torch.Tensor:
        """Elements [offset, offset + length) of a tensor, [length] on the CPU. CheckpointError if some are missing."""
        numel = math.prod(self.manifest["parameters"][name]["shape"])
        end = numel if length is None else offset + length
        out: torch.Tensor | None = None
        covered = 0
        for piece in self._pieces.get((name, key), []):
            first, last = max(offset, piece["offset"]), min(end, piece["offset"] + piece["length"])
            if first >= last:
                continue
            source = self._open(piece["file"]).get_slice(f"{name}:{key}")
            part = source[first - piece["offset"] : last - piece["offset"]]
            if out is None:
                out = torch.empty(end - offset, dtype=part.dtype)
            out[first - offset : last - offset] = part
            covered += last - first
        if out is None or covered != end - offset:
            raise CheckpointError(f"{covered} of {end - offset} elements of {name}:{key} are there", where=self.folder)
        return out

    def frozen(self, name: str) -> torch.Tensor:
        """A buffer, or a parameter that was not trained."""
        return self._open(FROZEN).get_tensor(name)

    def frozen_names(self) -> list[str]:
        """Names of the buffers and untrained parameters."""
        return sorted(self._open(FROZEN).keys())

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot be read ({error})", where=self.folder / file, hint=_HINT) from None
        return self._files[file]


def load_state(training: Training, pieces: PieceReader) -> Position:
    """Put weights, optimizer state and buffers into the live engine; every rank calls it.

    Raises CheckpointError where the checkpoint's parameters are not this model's.
    """
    manifest = pieces.manifest
    _compare_parameters(training.module, manifest, pieces.folder)
    inner = state.inner_optimizer(training.optimizer)
    prepared: set[torch.Tensor] = set()
    for fragment in state.fragments(training.module, training.optimizer, training.rank):
        keys = pieces.keys(fragment.name)
        if keys and fragment.owner not in prepared:
            prepared.add(fragment.owner)
            numbers = manifest["parameters"][fragment.name]["scalars"]
            state.create_state(inner, fragment.owner, keys, numbers)
        for key in [state.WEIGHT, *keys]:
            values = pieces.read(fragment.name, key, fragment.offset, fragment.length)
            fragment.view(key, inner.state).copy_(values)
    for name, parameter in training.module.named_parameters():
        trained = manifest["parameters"][name]["trained"]
        full = pieces.read(name, state.WEIGHT) if trained else pieces.frozen(name)
        state.refresh_model(parameter, full, training.rank)
    for name, buffer in state.buffers(training.module):
        buffer.copy_(pieces.frozen(name))
    return Position(**manifest["position"])


def _compare_parameters(module: torch.nn.Module, manifest: dict[str, Any], folder: Path) -> None:
    here = {name: list(state.shape_of(p)) for name, p in module.named_parameters()}
    there = {name: facts["shape"] for name, facts in manifest["parameters"].items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise CheckpointError(
                f"{name} has shape {there.get(name)} in the checkpoint and {here.get(name)} in this model",
                where=folder,
                hint="resume with the configuration of the run that wrote it",
            )
