"""Resolve a path or name to a model: the one rule for evaluate, fill, compare, report, grow and push.

- A checkpoint-N folder or a model folder is used as it is.
- For a run's folder, the newest weights are used: RUN/model if it was consolidated from the newest checkpoint, else
  that checkpoint. One line reports a RUN/model that is older, of another run, or changed by hand; commands that need
  a consolidated model refuse it.
- Anything else is a name on the Hub.

    found = resolve_model_path("runs/mine")      # found.folder, found.tokenizer, found.lineage
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from cloze.checkpoint.format import (
    MANIFEST,
    MOST_DELETED,
    find_checkpoint,
    list_checkpoints,
    read_manifest,
    still_there,
    verify_checkpoint,
)
from cloze.checkpoint.lineage import Lineage, changed_file, describe, of_checkpoint, read_record, run_id, same_run
from cloze.errors import CheckpointError, ModelError
from cloze.utils import run_files
from cloze.utils.foreign.folders import foreign_owner
from cloze.utils.foreign.json_yaml import read_mapping
from cloze.utils.foreign.lenient_read import part
from cloze.utils.foreign.paths import real_path
from cloze.utils.terminal.console import warn

_HINT = "give a run, a model folder or a name on the Hub"


@dataclass(frozen=True)
class ModelPath:
    """`folder`: a checkpoint, a model folder, or a name on the Hub; `tokenizer`: where its tokenizer is; `run_dir`:
    the run that it belongs to, None if unknown; `lineage`: None if it is not recorded."""

    folder: str
    tokenizer: str
    run_dir: Path | None = None
    lineage: Lineage | None = None


def resolve_model_path(name: str, consolidated: bool = False) -> ModelPath:
    """Return the model for `name`. `consolidated`: require a model folder or a name on the Hub.

    Raises ModelError if there is no model, or if `consolidated` and RUN/model is not the run's newest; CheckpointError
    if the checkpoint is damaged.
    """
    path = Path(name)
    if (path / MANIFEST).is_file():
        if consolidated:
            raise _no_model_yet(path)
        with still_there(path):
            verify_checkpoint(path)
        return _checkpoint(path)
    if is_run(path):
        return _of_run(path, consolidated)
    if (path / "config.json").is_file():
        return _model_folder(path)
    owner = foreign_owner(path)
    if owner is not None:
        raise ModelError(f"this is {owner.what}", where=name, hint=owner.hint)
    if path.is_dir():
        raise ModelError("not a model folder: there is no config.json", where=name, hint=_HINT)
    if not path.exists() and name.startswith((".", "/", "runs/")):
        raise ModelError("no such folder", where=name, hint=_HINT)
    return ModelPath(name, name)


def is_run(path: Path) -> bool:
    """Return whether a folder is a run's, with or without a model in it."""
    return (
        (path / "model" / "config.json").is_file()
        or (path / run_files.CONFIG).is_file()
        or (path / run_files.METRICS).is_file()
        or any((folder / MANIFEST).is_file() for folder in list_checkpoints(path))
    )


def newer_checkpoint(run_dir: Path, lineage: Lineage) -> Path | None:
    """Return the newest undamaged checkpoint that is newer than `lineage`, or of the same step with other weights;
    None if nothing matches. Reads the files of such candidates only."""
    own = run_id(read_mapping(run_dir / run_files.IDENTITY))
    candidates, deleted = list_checkpoints(run_dir), 0
    while candidates:
        folder = candidates.pop()
        step = int(folder.name.rpartition("-")[2])
        if lineage.step is None or step < lineage.step:
            return None
        if not (folder / MANIFEST).is_file() and folder.exists():
            continue
        try:
            if step == lineage.step and not _differs(folder, lineage):
                return None
            verify_checkpoint(folder)
            if is_of_run(folder, own):
                return folder
        except CheckpointError as error:
            if not folder.exists() and deleted < MOST_DELETED:  # by the rotation of a run in progress
                candidates, deleted = list_checkpoints(run_dir), deleted + 1
                continue
            warn(f"{error}; trying the checkpoint before")
            continue
        warn(f"{folder}: belongs to another run than the folder it is in, and is left out")
    return None


def is_of_run(folder: Path, own: str | None) -> bool:
    """Return whether a checkpoint belongs to the run with the id `own`; True if either is unknown."""
    return same_run(own, run_id(part(read_manifest(folder), "run")))


def run_of(checkpoint: Path) -> Path | None:
    """Return the run folder that contains a checkpoint; None if the folder is no run's or another run's."""
    run_dir = real_path(checkpoint.parent)  # the checkpoint may be a link to another disk
    own = run_id(read_mapping(run_dir / run_files.IDENTITY))
    return run_dir if (run_dir / run_files.CONFIG).is_file() and is_of_run(checkpoint, own) else None


def _differs(folder: Path, lineage: Lineage) -> bool:
    """Return whether a checkpoint of the same step has other weights. The members of an average may be gone."""
    if lineage.kind not in ("trained", "ema"):
        return False
    key = "ema" if lineage.kind == "ema" else "weight"
    return of_checkpoint(read_manifest(folder), key).weights != lineage.weights


def _of_run(path: Path, consolidated: bool) -> ModelPath:
    model = path / "model"
    if (model / "config.json").is_file():
        found, problem = _examine(model, path)
        if consolidated and problem is None and found.lineage is None and _records_lineage(path):
            problem = "does not record the checkpoint it is made of, as a model of this run would"
        if problem is None:
            _warn_unrecorded(found)
            return found
        if consolidated:
            hint = f"run `cloze consolidate {path}`, or give {model} to take it as it is"
            raise ModelError(problem, where=model, hint=hint)
        newest = _newest(path)
        if newest is None:
            warn(f"{model}: {problem}; it is used as it is")
            return found
        warn(f"{model}: {problem}; {newest} is used; `cloze consolidate {path}` makes {model} again")
        return _checkpoint(newest)
    newest = None if consolidated else _newest(path)
    if newest is None:
        raise _no_model_yet(path)
    return _checkpoint(newest)


def _newest(path: Path) -> Path | None:
    return find_checkpoint(path) if _has_whole_checkpoint(path) else None


def _model_folder(path: Path) -> ModelPath:
    parent = real_path(path).parent
    found, problem = _examine(path, parent if (parent / run_files.CONFIG).is_file() else None)
    if problem is not None:
        warn(f"{path}: {problem}; it is used as it is")
    else:
        _warn_unrecorded(found)
    return found


def _warn_unrecorded(found: ModelPath) -> None:
    """Warn about a model that does not record the checkpoint it was made from."""
    if found.lineage is None and found.run_dir is not None and _has_whole_checkpoint(found.run_dir):
        why = f"{found.folder}: does not record the checkpoint it is made of"
        warn(f"{why}; `cloze consolidate {found.run_dir}` makes it again")


def _examine(model: Path, run_dir: Path | None) -> tuple[ModelPath, str | None]:
    """Return a model folder, and why it is not its run's newest model; None if it is, or if no lineage is recorded."""
    lineage = read_record(model)
    if lineage is None:
        return ModelPath(str(model), str(model), run_dir), None
    if changed := changed_file(model):
        found = ModelPath(str(model), str(model), run_dir)
        return found, f"{changed} is not the file that consolidation wrote, so its weights are unknown"
    found = ModelPath(str(model), str(model), run_dir, lineage)
    if run_dir is None:
        return found, None
    if not same_run(lineage.run, run_id(read_mapping(run_dir / run_files.IDENTITY))):
        found = ModelPath(str(model), str(model), None, lineage)
        return found, f"is of {describe(lineage)} of another run than the one in {run_dir}"
    newer = newer_checkpoint(run_dir, lineage)
    return found, None if newer is None else f"is of {describe(lineage)}, and {newer.name} is newer"


def _has_whole_checkpoint(run_dir: Path) -> bool:
    return any((folder / MANIFEST).is_file() for folder in list_checkpoints(run_dir))


def _records_lineage(run_dir: Path) -> bool:
    """Return whether a version of Cloze whose models record their lineage wrote a checkpoint of the run. Such a
    version also identifies a run's data by its blocks."""
    for folder in reversed(list_checkpoints(run_dir)):
        with contextlib.suppress(CheckpointError):
            if "blocks" in part(read_manifest(folder), "run"):
                return True
    return False


def _checkpoint(folder: Path) -> ModelPath:
    with still_there(folder):
        return ModelPath(str(folder), str(folder / "model"), run_of(folder), of_checkpoint(read_manifest(folder)))


def _no_model_yet(path: Path) -> ModelError:
    return ModelError("there is no model here yet", where=path, hint=f"run `cloze consolidate {path}` first")
