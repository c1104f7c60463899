"""The format of a checkpoint: names, manifest, verification and rotation.

A save writes to a temporary folder and renames it to checkpoint-N last, so a folder of that name is complete. The
manifest holds the size and checksum of each file and a checksum of itself, which reveal later damage.

    for folder in reversed(list_checkpoints(output_dir)):
        manifest = verify_checkpoint(folder)        # CheckpointError names the first bad file
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloze.checkpoint.schema import check_manifest
from cloze.distributed.resilience.run_owner import check_owner, owner_token
from cloze.errors import CheckpointError
from cloze.utils import run_files
from cloze.utils.atomic_files import publish, remove_tree, sha256, write_json, write_text
from cloze.utils.foreign.folders import foreign_owner
from cloze.utils.foreign.json_yaml import dump_json, finite, read_json
from cloze.utils.foreign.paths import check_regular, printable
from cloze.utils.terminal.console import warn

FORMAT_VERSION = 2
MANIFEST, FROZEN, PROBE = run_files.CHECKPOINT, "frozen.safetensors", "probe.safetensors"
HINT = "use an earlier checkpoint"
MOST_READABLE_PIECES = 100_000
MOST_DELETED = 20  # limit on checkpoints deleted by a running training during the search for the newest good one
MAX_MANIFEST_BYTES = 8 << 30  # enough for millions of pieces: see docs/scaling.md
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFT_OVER = re.compile(r"checkpoint-\d+\.(tmp|old|replaced)-[0-9a-f]{16}")
_OLDER_LEFT_OVER = re.compile(r"checkpoint-\d+\.replaced")  # earlier versions used no owner token
WEIGHT = "weight"  # state key of the fp32 weight; the others are the optimizer's (exp_avg, exp_avg_sq, ...)
NUMBERS = ("step",)  # optimizer state stored as one number, even if a parameter has the same shape: [] or [1]
EMA = "ema"  # state key of the moving average of the weights (see cloze.training.engines.ema)


@dataclass(frozen=True)
class Position:
    """A run's position in its data: equal on all ranks, and independent of their number."""

    global_step: int
    samples_seen: int
    tokens_seen: int


def checkpoint_path(output_dir: Path, global_step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return output_dir / f"checkpoint-{global_step}"


def is_checkpoint_name(name: str) -> bool:
    """Return whether the name is that of a checkpoint folder: checkpoint-N."""
    return _NAME.fullmatch(name) is not None


def list_checkpoints(output_dir: Path, at_most: int | None = None) -> list[Path]:
    """Return the folders called checkpoint-N with N <= `at_most`, oldest first, damaged ones included."""
    found = [(int(m.group(1)), p) for p in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for step, path in sorted(found) if at_most is None or step <= at_most]


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write checkpoint.json with a checksum of itself. It is indented unless it has millions of pieces (see
    docs/scaling.md), because indenting would then dominate the time of a save."""
    if len(manifest.get("pieces", [])) > MOST_READABLE_PIECES:
        write_text(folder / MANIFEST, dump_json(signed(manifest)) + "\n")
    else:
        write_json(folder / MANIFEST, signed(manifest))


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest with a checksum of itself."""
    manifest = finite(manifest)
    return {**manifest, "checksum": _checksum(manifest)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return checkpoint.json. Raises CheckpointError if it is missing, damaged or of another format."""
    file = folder / MANIFEST
    if not file.exists() and not file.is_symlink():
        raise _not_a_checkpoint(folder)
    try:
        manifest = read_json(file, max_bytes=MAX_MANIFEST_BYTES, error=CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"damaged: {error.what}", where=file, hint=HINT) from None
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        hint = "use a newer Cloze" if newer else "use the Cloze that wrote it"
        raise CheckpointError(f"format {printable(str(version))} is not known here", where=folder, hint=hint)
    if manifest.pop("checksum", None) != _checksum(manifest):
        raise CheckpointError("damaged", where=file, hint=HINT)
    try:
        check_manifest(manifest)
    except ValueError as error:
        raise CheckpointError(f"damaged: {error}", where=file, hint=HINT) from None
    return dict(manifest)


def _not_a_checkpoint(folder: Path) -> CheckpointError:
    """Return the error for a folder without checkpoint.json; it names the program that wrote the folder, if known."""
    owner = foreign_owner(folder)
    if owner is not None:
        return CheckpointError(f"this is {owner.what}, not a checkpoint of Cloze", where=folder, hint=owner.hint)
    what = "not a checkpoint: there is no checkpoint.json"
    return CheckpointError(what, where=folder, hint="give a checkpoint-N folder that `cloze train` saved")


def own_checkpoints(output_dir: Path, at_most: int | None = None) -> list[Path]:
    """Return the folders of `list_checkpoints` that Cloze wrote. Raises CheckpointError if all are of other
    programs."""
    found = list_checkpoints(output_dir, at_most)
    own = [folder for folder in found if foreign_owner(folder) is None]
    if found and not own:
        raise _not_a_checkpoint(found[-1])
    return own


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verify_checkpoint(folder: Path, contents: bool = True, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Check every file's size and, with `contents`, its SHA-256; return the manifest.

    `share` = (i, n): read the contents of every n-th file only, for n ranks that share the check. Raises
    CheckpointError if a file is missing or damaged, or if the folder's name gives another step than its manifest.
    """
    manifest = read_manifest(folder)
    step = manifest["position"]["global_step"]
    if is_checkpoint_name(folder.name) and int(folder.name.split("-")[1]) != step:
        raise CheckpointError(f"holds step {step:,}", where=folder, hint=f"rename it to checkpoint-{step}")
    index, count = share
    for number, (name, facts) in enumerate(sorted(manifest["files"].items())):
        file = folder / name
        if not file.exists() and not file.is_symlink():
            raise CheckpointError("missing", where=file, hint=HINT)
        check_regular(file, folder=folder, error=CheckpointError)
        try:
            size = file.stat().st_size
            if size != facts["bytes"]:
                raise CheckpointError(f"{size} bytes where {facts['bytes']} were written", where=file, hint=HINT)
            if contents and number % count == index and sha256(file) != facts["sha256"]:
                raise CheckpointError("damaged: the checksum is not the one that was written", where=file, hint=HINT)
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error.strerror})", where=file, hint=HINT) from None
    return manifest


def find_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest undamaged checkpoint in a run's folder; None if nothing was saved yet.

    Raises CheckpointError if all checkpoints are damaged.
    """
    candidates, deleted = own_checkpoints(output_dir), 0
    while candidates:
        folder = candidates.pop()
        try:
            verify_checkpoint(folder)
            return folder
        except CheckpointError as error:
            if not folder.exists() and deleted < MOST_DELETED:  # by the rotation of a run that is being trained
                candidates, deleted = own_checkpoints(output_dir), deleted + 1
                continue
            warn(f"{error}; trying the checkpoint before")
    if own_checkpoints(output_dir):
        raise all_damaged(output_dir)
    return None


@contextlib.contextmanager
def still_there(*folders: Path) -> Iterator[None]:
    """Raise CheckpointError for any error in the block if one of the folders was deleted meanwhile, as training does
    with checkpoints beyond save_total_limit."""
    try:
        yield
    except Exception:
        for folder in folders:
            if not folder.is_dir():
                hint = "training keeps the newest ones only (--save_total_limit): run the command again"
                raise CheckpointError("was deleted while it was read", where=folder, hint=hint) from None
        raise


def all_damaged(output_dir: Path) -> CheckpointError:
    """Return the error for a run without a usable checkpoint."""
    return CheckpointError("all checkpoints are damaged", where=output_dir, hint="start in another output_dir")


def aside_name(folder: Path, why: str) -> Path:
    """Return the temporary name of a checkpoint that is written (`why`: tmp), deleted (old) or replaced. It is unique
    to this start of the run."""
    return folder.with_name(f"{folder.name}.{why}-{owner_token(folder.parent)}")


def replace_checkpoint(staged: Path, folder: Path) -> None:
    """Rename a finished folder to its final name. An older folder of that name is moved aside first and deleted last.
    Raises OwnerError if another start owns the run."""
    check_owner(folder.parent)
    aside = aside_name(folder, "replaced")
    remove_tree(aside)
    if folder.is_symlink() or folder.exists():
        folder.rename(aside)
    publish(staged, folder)
    delete_checkpoint(aside)


def delete_checkpoint(aside: Path) -> None:
    """Delete a checkpoint that was renamed. Of a symbolic link, only the link is removed, with a warning. The next
    start deletes what cannot be deleted now."""
    if aside.is_symlink():
        name = aside.name.split(".")[0]
        warn(f"{name} was a link to {os.readlink(aside)}: the link is removed, its target is kept")
    remove_tree(aside, quietly=True)


def rotate(output_dir: Path, keep: int | None, saved: Path | None = None) -> None:
    """Delete the oldest checkpoints, except the newest `keep`, the newest good one, and `saved`, which was just
    written.

    An interrupted deletion leaves no folder called checkpoint-N. Raises OwnerError if another start owns the run.
    """
    if keep is None:
        return
    whole = [folder for folder in list_checkpoints(output_dir) if (folder / MANIFEST).is_file()]
    kept, doomed = whole[-keep:], [folder for folder in whole[:-keep] if folder != saved]
    if doomed and not any(_is_good(folder, contents=False) for folder in reversed(kept)):
        last_good = next((folder for folder in reversed(doomed) if _is_good(folder, contents=True)), None)
        doomed = [folder for folder in doomed if folder != last_good]
    for folder in doomed:
        check_owner(output_dir)
        aside = aside_name(folder, "old")
        remove_tree(aside)
        folder.rename(aside)
        delete_checkpoint(aside)


def _is_good(folder: Path, contents: bool) -> bool:
    try:
        verify_checkpoint(folder, contents)
        return True
    except CheckpointError:
        return False


def tidy(output_dir: Path) -> None:
    """Remove leftovers of interrupted saves and deletions; restore what an interrupted replacement moved aside.

    Only the owner of the run calls it. A leftover's name has the token of a start; folders without a token are the
    user's.
    """
    for path in output_dir.glob("checkpoint-*"):
        if _LEFT_OVER.fullmatch(path.name) or _OLDER_LEFT_OVER.fullmatch(path.name):
            final = path.with_suffix("")
            if path.suffix.startswith(".replaced") and not final.exists():
                path.rename(final)
            elif _LEFT_OVER.fullmatch(path.name):
                remove_tree(path, quietly=True)
