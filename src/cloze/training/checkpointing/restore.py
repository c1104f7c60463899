"""Choose the checkpoint to resume on all ranks, and load it into an engine.

Pieces are found by parameter name and offset, independent of the engine and number of ranks that wrote them. Each rank
reads its own share plus one tensor at a time.

    folder = choose_checkpoint(output_dir, "auto", rank, world_size)
    with PieceReader(folder, read_manifest(folder)) as pieces:
        load_state(engine, pieces)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloze.checkpoint.checksum import add_sums, content_sum
from cloze.checkpoint.format import WEIGHT, Position, all_damaged, own_checkpoints, verify_checkpoint
from cloze.checkpoint.reader import PieceReader
from cloze.distributed.collectives import gather, gather_to_main, raise_on_any_rank, run_on_main_and_broadcast
from cloze.errors import CheckpointError, error_phase
from cloze.training.engines.base import Engine
from cloze.training.engines.sharded_state import Fragment, buffers, create_state, tensor_keys
from cloze.utils.heartbeat import beat
from cloze.utils.terminal.console import warn


@error_phase("resume")
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
    candidates = (
        run_on_main_and_broadcast(lambda: own_checkpoints(output_dir, at_most)) if choice == "auto" else [Path(choice)]
    )
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


def load_state(engine: Engine, pieces: PieceReader) -> Position:
    """Load weights, optimizer state and buffers into the engine; every rank calls it.

    Each rank reads its own slices, and whole parameters one at a time for the copy that the model computes with. Then
    the engine's contents are compared with the checkpoint's checksums. Raises CheckpointError if the checkpoint's
    parameters are not this model's, or the engine does not hold what was stored.
    """
    manifest = pieces.manifest
    _compare_parameters(engine, manifest, pieces.folder)
    engine.forget()
    held = engine.fragments()
    for fragment in held:  # without a variable, which would keep the tensor while the next one is read
        beat()
        keys = pieces.keys(fragment.name)
        create_state(engine.inner, fragment, keys, pieces.numbers(fragment.name))
        for key in [WEIGHT, *keys]:
            fragment.view(key, engine.state).copy_(pieces.read(fragment.name, key, fragment.offset, fragment.length))
    _restore_steps(engine, manifest)
    for name, parameter in engine.module.named_parameters():
        beat()
        trained = manifest["parameters"][name]["trained"]
        full = pieces.read(name, WEIGHT) if trained else pieces.frozen(name)
        engine.refresh(parameter, full)
        if (exact := engine.frozen.get(name)) is not None:
            exact.copy_(full)
    for name, buffer in buffers(engine.module):
        buffer.copy_(pieces.frozen(name))
    _check_contents(engine, held, pieces)
    return Position(**manifest["position"])


def _restore_steps(engine: Engine, manifest: dict[str, Any]) -> None:
    """Restore the steps that some optimizers count per group, not per parameter."""
    saved = {name: group for group in manifest["optimizer"]["groups"] for name in group["params"]}
    for names, group in zip(engine.group_names, engine.inner.param_groups, strict=True):
        group.pop("step", None)
        if "step" in saved.get(names[0], {}):
            group["step"] = saved[names[0]]["step"]


def _check_contents(engine: Engine, held: list[Fragment], pieces: PieceReader) -> None:
    """Compare the checksum of every tensor in the engine with the stored one (deepspeed issue 6691: weights that
    were never loaded went unnoticed)."""
    state = engine.state
    here = {
        (f.name, key): content_sum(f.view(key, state), f.offset)
        for f in held
        for key in [WEIGHT, *tensor_keys(f, state)]
    }
    if engine.partitioned:
        parts = gather_to_main(here)  # not to all: under ZeRO-3 each rank has one of every tensor
        if engine.rank > 0:
            raise_on_any_rank(None)
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
    raise_on_any_rank(problem)


def _compare_parameters(engine: Engine, manifest: dict[str, Any], folder: Path) -> None:
    here = {name: list(engine.shape_of(p)) for name, p in engine.module.named_parameters()}
    there = {name: facts["shape"] for name, facts in manifest["parameters"].items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise CheckpointError(
                f"{name} has shape {there.get(name)} in the checkpoint and {here.get(name)} in this model",
                where=folder,
                hint="resume with the configuration of the run that wrote it",
            )
