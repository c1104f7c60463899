"""Choose a checkpoint together, and put its state into a live engine.

Pieces are found by parameter name and offset, so the engine and the number of ranks that wrote them do not matter,
and each rank reads its own share plus one tensor at a time.

    folder = choose_checkpoint(output_dir, "auto", rank, world_size)
    with PieceReader(folder, read_manifest(folder)) as pieces:
        load_state(training, pieces)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from cloze.collectives import agree, decide, gather, gather_to_main
from cloze.console import warn
from cloze.errors import CheckpointError, in_phase
from cloze.foreign.safetensors_header import map_tensors
from cloze.heartbeat import beat
from cloze.train import state
from cloze.train.checkpoint_files import FROZEN, HINT, Position, all_damaged, own_checkpoints, verify_checkpoint
from cloze.train.snapshot import Training
from cloze.train.sums import add_sums, content_sum


@in_phase("resume")
def choose_checkpoint(
    output_dir: Path, choice: str | None, rank: int, world_size: int, at_most: int | None = None
) -> Path | None:
    """Return the checkpoint to resume from, the same on every rank; None to start from step 0. Every rank calls it and
    reads its share of the files.

    `choice`: a folder; "auto" for the newest one that all ranks find whole, if any was saved; None not to resume.
    `at_most`: the latest step. Raises CheckpointError if the chosen one is damaged, or all of them are.
    """
    if choice is None:
        return None
    candidates = decide(lambda: own_checkpoints(output_dir, at_most)) if choice == "auto" else [Path(choice)]
    for folder in reversed(candidates):
        problem: CheckpointError | None = None
        try:
            verify_checkpoint(folder, share=(rank, world_size))
        except CheckpointError as error:
            problem = error
        found = next((one for one in gather(problem) if one is not None), None)
        if found is None:
            return folder
        if choice != "auto":
            raise found
        warn(f"{found}; trying the checkpoint before")
    if candidates:
        raise all_damaged(output_dir)
    return None


class PieceReader:
    """Reads any run of elements of any stored tensor. Use it as a context manager: files are mapped, not loaded."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self._files: dict[str, Any] = {}
        self._pieces: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._numbers: dict[str, dict[str, dict[str, Any]]] = {}
        for piece in manifest["pieces"]:
            if piece["key"] in state.NUMBERS:  # older versions stored those of parameters of shape [] as tensors
                self._numbers.setdefault(piece["name"], {})[piece["key"]] = piece
                continue
            self._pieces.setdefault((piece["name"], piece["key"]), []).append(piece)

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def sums(self) -> dict[tuple[str, str], int]:
        """The checksum of every stored tensor, by parameter name and key."""
        return {key: add_sums(piece["sum"] for piece in found) for key, found in self._pieces.items()}

    def keys(self, name: str) -> list[str]:
        """The optimizer's tensors stored for a parameter."""
        return sorted(key for other, key in self._pieces if other == name and key != state.WEIGHT)

    def numbers(self, name: str) -> dict[str, float]:
        """Return the optimizer's single numbers for a parameter.

        Older versions did not store those of parameters of shape [1]: they are taken from another parameter, since
        all parameters have taken the same steps.
        """
        parameters = self.manifest["parameters"]
        own = dict(parameters[name]["scalars"])
        for key, piece in self._numbers.get(name, {}).items():
            own[key] = float(self._open(piece["file"]).get_tensor(f"{name}:{key}"))
        if own or math.prod(parameters[name]["shape"]) != 1 or not self.keys(name):
            return own
        return dict(next((facts["scalars"] for facts in parameters.values() if facts["scalars"]), {}))

    def pieces(self, name: str, key: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The pieces of a tensor as they lie in the files: (offset, elements [n], mapped and not loaded)."""
        for piece in self._pieces.get((name, key), []):
            yield piece["offset"], self._tensor(piece["file"], f"{name}:{key}")

    def read(self, name: str, key: str, offset: int = 0, length: int | None = None) -> torch.Tensor:
        """Elements [offset, offset + length) of a tensor, [length] on the CPU. CheckpointError if some are missing."""
        numel = math.prod(self.manifest["parameters"][name]["shape"])
        end = numel if length is None else offset + length
        out: torch.Tensor | None = None
        covered = 0
        if end == offset:  # of a parameter without elements
            return torch.empty(0)
        for piece in self._pieces.get((name, key), []):
            first, last = max(offset, piece["offset"]), min(end, piece["offset"] + piece["length"])
            if first >= last:
                continue
            source = self._tensor(piece["file"], f"{name}:{key}", "get_slice")
            part = source[first - piece["offset"] : last - piece["offset"]]
            if last - first == end - offset:
                return part
            if out is None:
                out = torch.empty(end - offset, dtype=part.dtype)
            out[first - offset : last - offset] = part
            covered += last - first
        if out is None or covered != end - offset:
            raise CheckpointError(
                f"{covered} of {end - offset} elements of {name}:{key} are there",
                where=self.folder,
                hint="it is damaged: use another checkpoint",
            )
        return out

    def frozen(self, name: str) -> torch.Tensor:
        """A buffer, or a parameter that was not trained."""
        return self._tensor(FROZEN, name)

    def frozen_names(self) -> list[str]:
        """Names of the buffers and untrained parameters."""
        return sorted(self._open(FROZEN).keys())

    def _tensor(self, file: str, key: str, method: str = "get_tensor") -> Any:
        try:
            return getattr(self._open(file), method)(key)
        except SafetensorError:
            raise CheckpointError(f"has no {key}", where=self.folder / file, hint=HINT) from None

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = map_tensors(self.folder / file, folder=self.folder)
        return self._files[file]


def load_state(training: Training, pieces: PieceReader) -> Position:
    """Put weights, optimizer state and buffers into the live engine; every rank calls it.

    Each rank reads its own slices, and whole parameters one at a time for the copy that the model computes with. What
    the engine holds then is compared with the checkpoint's checksums. Raises CheckpointError where the checkpoint's
    parameters are not this model's, or the engine does not hold what was stored.
    """
    manifest = pieces.manifest
    _compare_parameters(training.module, manifest, pieces.folder)
    inner = state.inner_optimizer(training.optimizer)
    state.forget(training.optimizer)
    held = state.fragments(training.module, training.optimizer, training.rank)
    for fragment in held:  # what was read is not named: a name would keep it while the next is read
        beat()
        keys = pieces.keys(fragment.name)
        state.create_state(inner, fragment, keys, pieces.numbers(fragment.name))
        for key in [state.WEIGHT, *keys]:
            fragment.view(key, inner.state).copy_(pieces.read(fragment.name, key, fragment.offset, fragment.length))
    _restore_steps(training, manifest)
    for name, parameter in training.module.named_parameters():
        beat()
        trained = manifest["parameters"][name]["trained"]
        full = pieces.read(name, state.WEIGHT) if trained else pieces.frozen(name)
        state.refresh_model(parameter, full, training.rank)
        if (exact := training.frozen.get(name)) is not None:
            exact.copy_(full)
    for name, buffer in state.buffers(training.module):
        buffer.copy_(pieces.frozen(name))
    _check_contents(training, held, pieces)
    return Position(**manifest["position"])


def _restore_steps(training: Training, manifest: dict[str, Any]) -> None:
    """Put back the steps that some optimizers count for each group, not for each parameter."""
    saved = {name: group for group in manifest["optimizer"]["groups"] for name in group["params"]}
    for names, group in zip(training.group_names, state.inner_optimizer(training.optimizer).param_groups, strict=True):
        group.pop("step", None)
        if "step" in saved.get(names[0], {}):
            group["step"] = saved[names[0]]["step"]


def _check_contents(training: Training, held: list[state.Fragment], pieces: PieceReader) -> None:
    """Compare the checksum of every tensor in the engine with the stored one (deepspeed issue 6691: weights that
    were never loaded went unnoticed)."""
    optimizer_state = state.inner_optimizer(training.optimizer).state
    here = {
        (f.name, key): content_sum(f.view(key, optimizer_state), f.offset)
        for f in held
        for key in [state.WEIGHT, *state.tensor_keys(f, optimizer_state)]
    }
    if state.is_partitioned(training.module):
        parts = gather_to_main(here)  # under ZeRO-3 each has one of every tensor: too much for each to hear of all
        if training.rank > 0:
            agree(None)
            return
        here = {key: add_sums(part.get(key, 0) for part in parts) for key in {key for part in parts for key in part}}
    stored = pieces.sums()
    different = sorted(":".join(key) for key in here.keys() | stored.keys() if here.get(key) != stored.get(key))
    problem = None
    if different:
        problem = CheckpointError(
            f"the engine does not hold what the checkpoint stores ({len(different)} tensors, {different[0]} first)",
            where=pieces.folder,
            hint="this is a bug in Cloze; please report it with the engine and the architecture",
        )
    agree(problem)


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
