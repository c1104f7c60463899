"""A run's folder: its contents before the first step, and whether a checkpoint belongs to it.

config.yaml     the resolved configuration
run.json        the run's identity: hyperparameters, global batch, checksum of the data
data.json       the manifest of the prepared data
metrics.jsonl   one line per logged step
sessions.json   each start: devices, ranks, engine, versions
status.json     running, stopped, finished or failed
error.json      of a failed start: first failing rank, place, cause (cloze.distributed.resilience.error_records)
.owner          during training: its process (cloze.distributed.resilience.run_owner)
checkpoint-N/   see cloze.training.checkpointing.saver
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from cloze.checkpoint.format import MANIFEST, is_checkpoint_name, list_checkpoints, own_checkpoints
from cloze.config import TrainConfig
from cloze.distributed.resilience.error_records import FailureLog, forget, secret_values
from cloze.distributed.resilience.run_owner import check_owner, is_ours
from cloze.errors import ConfigError, OwnerError
from cloze.training.branch import BRANCHED, begin_branch, branch_of, is_in_run, set_aside_newer
from cloze.utils import run_files
from cloze.utils.atomic_files import auxiliary_write, disk_errors, write_json, write_text
from cloze.utils.environment import processes
from cloze.utils.foreign.paths import real_path
from cloze.utils.shareable import SECRETS
from cloze.utils.terminal.console import is_main, own_rank


def resolved(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration to store in the run's folder: every value but the tokens."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in SECRETS}


def failure_log(config: TrainConfig) -> FailureLog:
    """Return this rank's part of the run's error.json, which it writes only if this launch owns the folder."""
    run_dir, world_size = Path(config.output_dir), processes.world_size()
    return FailureLog(run_dir, own_rank(), world_size, secret_values(config), partial(is_ours, run_dir))


def resumes_run(config: TrainConfig) -> bool:
    """Return whether this start resumes a run in an existing folder; else the folder may be another run's."""
    return config.resume_from_checkpoint is not None and (Path(config.output_dir) / run_files.IDENTITY).is_file()


@contextlib.contextmanager
def kept_failures(config: TrainConfig) -> Iterator[None]:
    """Record also failures before the ranks watch each other, if the run's folder exists."""
    log = failure_log(config) if resumes_run(config) else None
    if log is not None:
        log.begin()
    try:
        yield
    except Exception as error:
        if log is not None:
            log.leave(error)
        raise


def write_status(output_dir: Path, status: str, line: str) -> None:
    """Write status.json: running, stopped (to be resumed), finished or failed, and one line about it; on rank 0 only,
    and not in a folder that another start has taken over."""
    if is_main():
        with contextlib.suppress(OwnerError), auxiliary_write(output_dir / run_files.STATUS):
            check_owner(output_dir)
            write_json(output_dir / run_files.STATUS, {"status": status, "line": line})


def check_run_folder(config: TrainConfig) -> None:
    """Raise ConfigError if a start would overwrite a run that it does not resume, or write into a model folder
    (replaced by consolidation) or a checkpoint (deleted by training). Rank 0 calls it early."""
    output_dir, choice = Path(config.output_dir), config.resume_from_checkpoint
    _check_place(config, output_dir)
    if not list_checkpoints(output_dir) and not (output_dir / run_files.METRICS).exists():
        return
    hint = "continue it with --resume_from_checkpoint auto, or choose another --output_dir"
    if choice is None:
        if not (output_dir / run_files.METRICS).exists():
            own_checkpoints(output_dir)  # reads to which run they belong
        raise ConfigError("holds a run already", where=output_dir, hint=hint)
    if choice != "auto" and not is_in_run(Path(choice), output_dir):
        branched = branch_of(output_dir)
        if list_checkpoints(output_dir) or branched is None or real_path(branched) != real_path(choice):
            raise ConfigError(f"holds a run already, and {choice} is of another", where=output_dir, hint=hint)


def _check_place(config: TrainConfig, output_dir: Path) -> None:
    hint = "choose another --output_dir"
    folder = real_path(output_dir)
    for one in (folder, *folder.parents):
        in_run = (one.name == "model" or is_checkpoint_name(one.name)) and (one.parent / run_files.IDENTITY).is_file()
        if in_run or (one / MANIFEST).is_file():
            whose = f"the run {one.parent}" if in_run else "a checkpoint"
            raise ConfigError(f"is inside {one.name} of {whose}", where=output_dir, hint=hint)
    if (folder / "config.json").is_file() and not (folder / run_files.IDENTITY).is_file():
        raise ConfigError("is a model folder: there is a config.json", where=output_dir, hint=hint)
    base = config.model_name_or_path
    if base and config.resume_from_checkpoint is None and Path(base).is_dir() and real_path(base) == folder:
        raise ConfigError("is the folder of the base model", where=output_dir, hint=hint)


def open_run_folder(
    config: TrainConfig,
    manifest: dict[str, Any],
    identity: dict[str, Any],
    checkpoint: Path | None = None,
    step: int = 0,
) -> Path:
    """Create the run's folder and describe the run in it; `identity` is that of `run_identity`.

    `checkpoint`, `step`: what it resumes from. If that belongs to another run's folder, this run becomes a branch of
    it; newer checkpoints in this folder are moved aside. Raises ConfigError if it holds another run.
    """
    output_dir = Path(config.output_dir)
    check_run_folder(config)
    with disk_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    described = dict(identity)
    if checkpoint is not None and not is_in_run(checkpoint, output_dir):
        described[BRANCHED] = begin_branch(checkpoint, step, output_dir)
    elif branch_of(output_dir) is not None:
        described[BRANCHED] = str(branch_of(output_dir))
    if checkpoint is not None:
        set_aside_newer(output_dir, step)
    write_text(output_dir / run_files.CONFIG, yaml.safe_dump(resolved(config), sort_keys=False))
    write_json(output_dir / run_files.IDENTITY, described)
    write_json(output_dir / run_files.DATA, manifest)
    forget(output_dir)
    write_status(output_dir, "running", "")
    return output_dir
