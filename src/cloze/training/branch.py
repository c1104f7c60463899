"""Resume from a checkpoint that is not the newest of its run, without silent loss.

    a run, resumed from its own checkpoint-100 while 200 exists      200 and the metrics move to a folder superseded-1
    a/checkpoint-10 with --output_dir b                              b becomes a branch of a, recorded in run.json
    the same if b holds a run already                                refused (see `run_folder.check_run_folder`)

Otherwise rotation would take the newer checkpoints for the newest, and delete the next ones saved.
"""

from __future__ import annotations

import json
from pathlib import Path

from cloze.checkpoint.format import list_checkpoints, verify_checkpoint
from cloze.checkpoint.run_folder import read_metrics
from cloze.errors import CheckpointError
from cloze.training.logging.sessions import read_sessions
from cloze.training.nonfinite import excluded_steps
from cloze.utils import run_files
from cloze.utils.atomic_files import disk_errors, write_json, write_text
from cloze.utils.foreign.json_yaml import read_json, read_mapping
from cloze.utils.foreign.paths import real_path
from cloze.utils.terminal.console import say

BRANCHED = "branched_from"


def is_in_run(checkpoint: Path, output_dir: Path) -> bool:
    """Return whether a checkpoint is in a run's folder; it may be a link to elsewhere."""
    return real_path(checkpoint.parent) == real_path(output_dir)


def branch_of(output_dir: Path) -> Path | None:
    """Return the checkpoint of another run from which this one started; None if it started at step 0."""
    found = read_mapping(output_dir / run_files.IDENTITY).get(BRANCHED)
    return Path(found) if isinstance(found, str) else None


def branch_to_resume(output_dir: Path) -> Path | None:
    """Return the checkpoint from which a branch without own checkpoints starts; None for any other run. Raises
    CheckpointError if it is missing, or run.json, which names it, is damaged: the branch must not start at 0."""
    if list_checkpoints(output_dir):
        return None
    if (output_dir / run_files.IDENTITY).exists():
        read_json(output_dir / run_files.IDENTITY, error=CheckpointError)
    found = branch_of(output_dir)
    if found is not None and not found.is_dir():
        hint = "give it with --resume_from_checkpoint where it is now, and another --output_dir"
        raise CheckpointError("this run is a branch of a checkpoint that is gone", where=found, hint=hint)
    if found is not None:
        verify_checkpoint(found, contents=False)
    return found


def begin_branch(checkpoint: Path, step: int, output_dir: Path) -> str:
    """Copy what belongs to the first `step` steps into a new run's folder, and return the path of its origin."""
    origin = checkpoint.parent
    lines = [line for line in read_metrics(origin) if line["step"] <= step]
    write_text(output_dir / run_files.METRICS, "".join(json.dumps(line) + "\n" for line in lines))
    sessions = [one for one in read_sessions(origin) if one["first_step"] < step]
    if sessions:
        write_json(output_dir / run_files.SESSIONS, {"sessions": sessions})
    if excluded := excluded_steps(origin):
        write_json(output_dir / run_files.EXCLUDED_STEPS, sorted(excluded))
    say("run", f"{output_dir} is a branch of {checkpoint}")
    return str(real_path(checkpoint))


def set_aside_newer(output_dir: Path, step: int) -> None:
    """Move checkpoints of later steps, and a copy of the metrics, into a new folder superseded-N."""
    newer = [folder for folder in list_checkpoints(output_dir) if int(folder.name.split("-")[1]) > step]
    if not newer:
        return
    with disk_errors(output_dir):
        number = 1
        while (aside := output_dir / f"superseded-{number}").exists():
            number += 1
        aside.mkdir()
        lines = read_metrics(output_dir)
        write_text(aside / run_files.METRICS, "".join(json.dumps(line) + "\n" for line in lines))
        for folder in newer:
            folder.rename(aside / folder.name)
    names = ", ".join(folder.name for folder in newer)
    say("run", f"resumes from step {step:,}: {names} moved to {aside}; remove it when it is not needed any more")
