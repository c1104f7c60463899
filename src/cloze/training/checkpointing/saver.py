"""Save checkpoints: per parameter, not per rank, and atomically.

    checkpoint-500/
      checkpoint.json             position, optimizer groups, configuration, and the place of each piece of each tensor
      rank-00000.safetensors ...  what each rank wrote, in parallel: pieces of fp32 weights and optimizer tensors
      frozen.safetensors          parameters that are not trained, and buffers
      probe.safetensors           a batch and the training model's logits on it, to verify a loaded model
      model/                      the model's configuration and tokenizer

Everything is written into `checkpoint-500.tmp-TOKEN`, flushed, described with sizes and checksums in checkpoint.json,
and renamed last: a folder called checkpoint-N is complete. Pieces are stored by parameter name, offset and length, so
any engine at any world size can read them.

    saver = CheckpointSaver(engine, save_model_files, in_background=True)
    saver.save(folder, position, probe, extra, keep=3)     # returns when the state is copied
    saver.wait()                                           # returns when it is on the disk
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cloze.checkpoint.checksum import content_sum
from cloze.checkpoint.format import (
    FROZEN,
    PROBE,
    WEIGHT,
    Position,
    aside_name,
    replace_checkpoint,
    rotate,
    write_manifest,
)
from cloze.checkpoint.safetensors_writer import Entry, write_tensors
from cloze.distributed.collectives import gather_to_main, make_group, run_on_main_and_broadcast
from cloze.distributed.resilience.run_owner import check_owner
from cloze.errors import ClozeError, DiskError
from cloze.training.checkpointing.snapshot import (
    Piece,
    Snapshot,
    check_names,
    describe,
    frozen_tensors,
    share_to_write,
)
from cloze.training.engines.base import Engine
from cloze.training.engines.sharded_state import scalars, tensor_keys
from cloze.utils.atomic_files import disk_errors, remove_tree, sha256, sync_tree
from cloze.utils.heartbeat import beat, join_progressing


class CheckpointSaver:
    """Saves the checkpoints of one run, one after another.

    In the background, a save copies the state to host memory, into reused buffers, and a thread writes it. The threads
    of the ranks communicate through their own process group. `save_model_files` writes the model's configuration and
    tokenizer into a folder.
    """

    def __init__(self, engine: Engine, save_model_files: Callable[[Path], None], in_background: bool):
        check_names(engine)
        self._engine, self._save_model_files = engine, save_model_files
        self._in_background = in_background
        self._group = make_group("gloo") if in_background else None
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def save(
        self,
        folder: Path,
        position: Position,
        probe: dict[str, torch.Tensor],
        extra: dict[str, Any],
        keep: int | None,
    ) -> None:
        """Save one checkpoint, then delete all but the newest `keep`; every rank calls it.

        `probe`: tensors for probe.safetensors (rank 0's are used). `extra` is added to checkpoint.json as it is.
        Raises DiskError on every rank if one of them cannot write, and removes the partial checkpoint. In the
        background, `wait` raises errors.
        """
        self.wait()
        staged = folder.with_name(run_on_main_and_broadcast(lambda: _fresh_folder(folder)))
        snapshot = self._snapshot(folder, staged, position, probe, extra, keep)
        if not self._in_background:
            self._write(snapshot)
            return
        self._thread = threading.Thread(target=self._write_later, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint being written. Raises DiskError on every rank if writing failed."""
        if self._thread is None:
            return
        join_progressing(self._thread)
        self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _write_later(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:  # raised in the training thread
            self._problem = error

    def _snapshot(
        self,
        folder: Path,
        staged: Path,
        position: Position,
        probe: dict[str, torch.Tensor],
        extra: dict[str, Any],
        keep: int | None,
    ) -> Snapshot:
        engine, state = self._engine, self._engine.state
        held = engine.fragments()
        pieces = []
        for fragment in share_to_write(held, engine):
            for key in [WEIGHT, *tensor_keys(fragment, state)]:
                tensor = fragment.view(key, state)
                pieces.append(Piece(fragment.name, key, fragment.offset, self._kept(fragment.name, key, tensor)))
        frozen = {name: self._kept(name, "frozen", tensor) for name, tensor in frozen_tensors(engine).items()}
        return Snapshot(
            folder=folder,
            staged=staged,
            pieces=pieces,
            shared={FROZEN: frozen, PROBE: probe} if engine.rank == 0 else {},
            scalars={f.name: scalars(f.owner, state) for f in held},
            manifest={**describe(engine, position), **extra},
            keep=keep,
        )

    def _kept(self, name: str, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor itself; for a save in the background, a copy in host memory."""
        if not self._in_background:
            return tensor
        buffer = self._buffers.get((name, key))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name, key] = buffer
        return buffer.copy_(tensor)

    def _write(self, snapshot: Snapshot) -> None:
        problem: ClozeError | None = None
        mine: dict[str, Any] = {}
        try:
            with disk_errors(snapshot.folder):
                mine = _write_own(snapshot, self._engine.rank)
                if self._engine.rank == 0:
                    mine["files"] |= _write_shared(snapshot, self._save_model_files)
        except ClozeError as error:
            problem = error
        parts = gather_to_main((problem, mine), self._group)
        run_on_main_and_broadcast(lambda: _commit(snapshot, parts), self._group)


def _fresh_folder(folder: Path) -> str:
    """Make the folder that a checkpoint is written into, and return its name."""
    check_owner(folder.parent)
    staged = aside_name(folder, "tmp")
    with disk_errors(folder):
        remove_tree(staged)
        staged.mkdir(parents=True)
    return staged.name


def _write_own(snapshot: Snapshot, rank: int) -> dict[str, Any]:
    """Write this rank's pieces; return their entries of the manifest."""
    file = f"rank-{rank:05d}.safetensors"
    entries, described = [], []
    for piece in snapshot.pieces:
        tensor = piece.tensor
        entries.append(Entry(f"{piece.name}:{piece.key}", tensor.dtype, tuple(tensor.shape), lambda t=tensor: t))  # type: ignore[misc]
        where = {"name": piece.name, "key": piece.key, "offset": piece.offset, "length": tensor.numel()}
        beat()
        described.append({**where, "file": file, "sum": content_sum(tensor, piece.offset)})
    written = write_tensors(snapshot.staged / file, entries)
    return {
        "files": {file: {"bytes": written.num_bytes, "sha256": written.sha256}},
        "pieces": described,
        "scalars": snapshot.scalars,
    }


def _write_shared(snapshot: Snapshot, save_model_files: Callable[[Path], None]) -> dict[str, Any]:
    """Write what rank 0 adds to its pieces; return sizes and checksums by file."""
    files = {}
    for file, tensors in snapshot.shared.items():
        entries = [Entry(k, v.dtype, tuple(v.shape), lambda v=v: v) for k, v in sorted(tensors.items())]  # type: ignore[misc]
        written = write_tensors(snapshot.staged / file, entries)
        files[file] = {"bytes": written.num_bytes, "sha256": written.sha256}
    save_model_files(snapshot.staged / "model")
    for path in sorted((snapshot.staged / "model").rglob("*")):
        if path.is_file():
            name = path.relative_to(snapshot.staged).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return files


def _commit(snapshot: Snapshot, parts: list[tuple[ClozeError | None, dict[str, Any]]]) -> None:
    """Describe what all ranks have written, flush it, and rename it, on rank 0."""
    try:
        for error, _ in parts:
            if error is not None:
                raise error
        _check_shared_disk(snapshot, [part for _, part in parts])
        numbers: dict[str, dict[str, float]] = {}
        for _, part in parts:
            numbers |= part["scalars"]
        manifest = dict(snapshot.manifest)
        manifest["parameters"] = {
            name: {**facts, "scalars": numbers.get(name, {})} for name, facts in manifest["parameters"].items()
        }
        manifest["pieces"] = [piece for _, part in parts for piece in part["pieces"]]
        manifest["files"] = {file: facts for _, part in parts for file, facts in part["files"].items()}
        with disk_errors(snapshot.folder):
            write_manifest(snapshot.staged, manifest)
            sync_tree(snapshot.staged)
            replace_checkpoint(snapshot.staged, snapshot.folder)
    finally:
        remove_tree(snapshot.staged, quietly=True)
    with disk_errors(snapshot.folder):
        rotate(snapshot.folder.parent, snapshot.keep, snapshot.folder)


def _check_shared_disk(snapshot: Snapshot, parts: list[dict[str, Any]]) -> None:
    """Raise DiskError if rank 0 does not see another rank's files: all must write into the same folder."""
    for rank, part in enumerate(parts):
        for file in part["files"]:
            if not (snapshot.staged / file).is_file():
                raise DiskError(
                    f"rank {rank} wrote {file}, but rank 0 does not see it",
                    where=snapshot.folder.parent,
                    hint="--output_dir must be on a disk that all machines share",
                )
