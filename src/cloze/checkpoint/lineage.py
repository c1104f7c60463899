"""The lineage of derived files: the checkpoints and the run that their weights come from, and a checksum.

A model folder, an evaluation, a card and a report outlive the weights they describe: the run continues, a model is
consolidated again, a file is replaced. So each records its weights, and readers compare.

    model/cloze.json      {"lineage": {...}, "files": {"model.safetensors": {"bytes": ..., "sha256": ...}}, ...}
    eval.json             {"perplexity": ..., "lineage": {...}}

    here = of_checkpoint(read_manifest(folder))      # from checkpoint.json alone, no tensor is read
    same_weights(here, read_record(model))           # True for a model that was consolidated from it

`weights` is the SHA-256 of canonical JSON (sorted keys) of two things: the name, shape and `content_sum` of each
trained parameter (see `cloze.checkpoint.checksum`), and the SHA-256 of frozen.safetensors, which holds buffers and
untrained parameters. So it is equal for any number of ranks and any engine, and a consolidated model has that of its
checkpoint. For an average it is the SHA-256 of its checkpoints' `weights` in order. `run` is a hash of values in
run.json (see `run_id`). No time is recorded, so a file that is made again has the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloze import __version__
from cloze.errors import ModelError
from cloze.utils.atomic_files import sha256, write_json
from cloze.utils.foreign.json_yaml import read_json, read_mapping
from cloze.utils.foreign.lenient_read import part

FILE, KEY = "cloze.json", "lineage"
KINDS = ("trained", "ema", "averaged", "averaged ema", "foreign", "grown")
WEIGHT_FILES = "model*.safetensors"
_RUN_KEYS = ("seed", "global_batch_size", "learning_rate")  # of run.json; `run_id` adds the data


@dataclass(frozen=True)
class Lineage:
    """`kind`: one of KINDS; `run`: see `run_id`, None if unknown; `steps`: those of its checkpoints, oldest first;
    `weights`: their checksum; `dtype`: the type in the file ("fp32", "bf16", "fp16")."""

    kind: str
    run: str | None
    steps: tuple[int, ...]
    weights: str
    dtype: str = "fp32"
    cloze_version: str = field(default=__version__, compare=False)

    @property
    def step(self) -> int | None:
        """Return the newest step; None if unknown."""
        return self.steps[-1] if self.steps else None

    def as_mapping(self) -> dict[str, Any]:
        """Return the lineage as JSON values."""
        return {**dataclasses.asdict(self), "steps": list(self.steps)}

    def __str__(self) -> str:
        steps = [f"{step:,}" for step in self.steps]
        if self.kind in ("foreign", "grown"):
            text = {"foreign": "another program's checkpoint", "grown": "a model that `cloze grow` made"}[self.kind]
        elif len(steps) > 1:
            of = "the moving averages" if self.kind == "averaged ema" else "the weights"
            text = f"the mean of {of} of steps {', '.join(steps[:-1])} and {steps[-1]}"
        else:
            text = f"{'the moving average of ' if self.kind == 'ema' else ''}step {''.join(steps) or '?'}"
        return text if self.dtype == "fp32" else f"{text} in {self.dtype}"


def describe(lineage: Lineage | None) -> str:
    """Return `step 40`, `the moving average of step 40`, `unknown weights`."""
    return "unknown weights" if lineage is None else str(lineage)


def run_id(identity: Mapping[str, Any]) -> str | None:
    """Return a run's id from run.json or a checkpoint's copy of it; None if that does not identify the data.

    Data are identified by the checksum of their blocks, or by their manifest if older versions recorded no checksum;
    the id begins with the kind of checksum. See `same_run`.
    """
    kind = "blocks" if identity.get("blocks") else "data"
    if not isinstance(identity.get(kind), str):
        return None
    return f"{kind}-{_digest({key: identity.get(key) for key in (kind, *_RUN_KEYS)})[:16]}"


def same_run(one: str | None, other: str | None) -> bool:
    """Return whether two ids may belong to one run; True if one is unknown or they identify data in different ways."""
    if one is None or other is None or one.split("-")[0] != other.split("-")[0]:
        return True
    return one == other


def of_checkpoint(manifest: Mapping[str, Any], key: str = "weight") -> Lineage:
    """Return the lineage of a checkpoint's fp32 weights from its checkpoint.json; `key`: "weight" or "ema"."""
    sums: dict[str, int] = {}
    for piece in manifest["pieces"]:
        if piece["key"] == key:
            sums[piece["name"]] = (sums.get(piece["name"], 0) + piece["sum"]) % (1 << 64)
    trained = {name: [manifest["parameters"][name]["shape"], total] for name, total in sums.items()}
    frozen = part(part(dict(manifest), "files"), "frozen.safetensors").get("sha256")
    return Lineage(
        kind="trained" if key == "weight" else "ema",
        run=run_id(part(dict(manifest), "run")),
        steps=(manifest["position"]["global_step"],),
        weights=_digest({"trained": trained, "frozen": frozen}),
    )


def of_average(members: Sequence[Lineage]) -> Lineage:
    """Return the lineage of the mean of several checkpoints, oldest first; of one checkpoint, its own."""
    if len(members) == 1:
        return members[0]
    return Lineage(
        kind="averaged ema" if members[-1].kind == "ema" else "averaged",
        run=members[-1].run,
        steps=tuple(step for one in members for step in one.steps),
        weights=_digest([one.weights for one in members]),
    )


def of_tensors(sums: Mapping[str, tuple[Sequence[int], int]], dtype: str, kind: str = "foreign") -> Lineage:
    """Return the lineage of weights without a Cloze checkpoint, from (shape, `content_sum`) of each tensor."""
    tensors = {name: [list(shape), total % (1 << 64)] for name, (shape, total) in sums.items()}
    return Lineage(kind, None, (), _digest({"tensors": tensors}), dtype)


def same_weights(one: Lineage | None, other: Lineage | None) -> bool:
    """Return whether both are known and describe the same weights in the same type."""
    return one is not None and other is not None and (one.weights, one.dtype) == (other.weights, other.dtype)


def from_mapping(values: Mapping[str, Any]) -> Lineage | None:
    """Return the lineage in the values of eval.json or cloze.json; None if it is missing or cannot be read."""
    found = values.get(KEY)
    if not isinstance(found, dict):
        return None
    kind, run, steps = found.get("kind"), found.get("run"), found.get("steps")
    weights, dtype = found.get("weights"), found.get("dtype", "fp32")
    if kind not in KINDS or not isinstance(weights, str) or not isinstance(dtype, str):
        return None
    if not isinstance(steps, list) or not all(type(step) is int and step >= 0 for step in steps):
        return None
    return Lineage(kind, run if isinstance(run, str) else None, tuple(steps), weights, dtype)


def scores_of(model: Lineage | None, scores: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the values of eval.json if they belong to the weights of `model`, else {} and a line with the reason.

    If neither records its weights, as in folders of older versions, the values are kept.
    """
    measured = from_mapping(scores)
    if not scores or same_weights(measured, model) or (measured is None and model is None):
        return scores, None
    line = f"eval.json is of {describe(measured)}, and the model of {describe(model)}"
    return {}, f"{line}; its numbers are left out, run `cloze evaluate` again"


def write_record(folder: Path, lineage: Lineage) -> None:
    """Write cloze.json into a model folder: the lineage, and size and SHA-256 of each weights file."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in _weight_files(folder)}
    write_json(folder / FILE, {"format_version": 1, KEY: lineage.as_mapping(), "files": files})


def read_record(folder: Path) -> Lineage | None:
    """Return a model folder's cloze.json; None if it is missing. Raises ModelError if it is unreadable."""
    path = folder / FILE
    if not os.path.lexists(path):
        return None
    hint = "run `cloze consolidate RUN` to make the model again"
    try:
        found = from_mapping(read_json(path, error=ModelError))
    except ModelError as error:
        raise ModelError(f"damaged: {error.what}", where=path, hint=hint) from None
    if found is None:
        raise ModelError("damaged: it does not record the weights in a way that is known here", where=path, hint=hint)
    return found


def changed_file(folder: Path) -> str | None:
    """Return the name of a weights file that differs from cloze.json; None if none does, or without cloze.json.

    Reads every byte of the files.
    """
    files = read_mapping(folder / FILE).get("files")
    if not isinstance(files, dict):
        return None
    here = {path.name: path for path in _weight_files(folder)}
    for name in sorted(here.keys() | files.keys()):
        facts = part(files, name)
        if name not in here or name not in files:
            return name
        if here[name].stat().st_size != facts.get("bytes") or sha256(here[name]) != facts.get("sha256"):
            return name
    return None


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(WEIGHT_FILES) if path.is_file())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
