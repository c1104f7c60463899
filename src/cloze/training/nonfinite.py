"""Losses and gradients that are not finite: find their source, and keep them out of the weights.

An engine skips a step whose gradient norm is NaN or infinite. `--on_nonfinite` then decides: stop, skip the batch, or
roll back to the last checkpoint and leave the batch out. All of it depends only on the run's position. fp16's loss
scaling skips a step now and then, with a report. MOST_SKIPPED skipped steps in a row end the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from cloze.data.batches.layout import Layout
from cloze.distributed.collectives import gather
from cloze.distributed.resilience.run_owner import check_owner
from cloze.errors import CheckpointError, TrainingError
from cloze.utils import run_files
from cloze.utils.atomic_files import disk_errors, write_json
from cloze.utils.foreign.json_yaml import read_json
from cloze.utils.foreign.paths import real_path

MOST_ROLLBACKS = 20
MOST_SKIPPED = 50  # steps in a row without finite gradients; then the run ends
REPORT_AGAIN = 10  # skipped steps in a row after which they are reported again
SMALLEST_SCALE = 1.0  # of fp16's loss; below it gradients are not too large but not finite


class RollBack(Exception):
    """Return to the last checkpoint and leave out the batch of `step` (0-based)."""

    def __init__(self, step: int, why: str):
        super().__init__(why)
        self.step = step


def describe_step(
    layout: Layout, global_step: int, losses: Sequence[float], grad_norm: float, scaled: bool
) -> str | None:
    """Return what is not finite in a skipped step, and where; None if all losses are finite and a loss scale can
    correct the gradient (`scaled`). Every rank calls it. `losses`: of this rank's micro-batches."""
    bad = []
    for micro_step, loss in enumerate(losses):
        if not math.isfinite(loss):
            samples = layout.samples(global_step, micro_step)
            bad.append((layout.rank, loss, samples[samples >= 0].tolist()))
    found = [one for part in gather(bad) for one in part]
    if found:
        where = "; ".join(f"rank {rank}, samples {_range(samples)}" for rank, _, samples in found)
        return f"loss is {found[0][1]} at step {global_step + 1} ({where})"
    if scaled:
        return None
    first, size = layout.batch_sizes.samples_before(global_step), layout.batch_sizes.size(global_step)
    return f"gradient norm is {grad_norm} at step {global_step + 1} (samples {first}-{first + size - 1})"


def _range(samples: list[int]) -> str:
    return f"{samples[0]}-{samples[-1]}" if samples else "none"


def nonfinite_error(why: str, output_dir: Path, global_step: int, hint: str) -> TrainingError:
    """Return the error that ends a run."""
    look = f"look at the batch with `cloze replay {output_dir} --step {global_step + 1}`"
    return TrainingError(why, where=output_dir, hint=f"{look}; {hint}")


def excluded_steps(output_dir: Path) -> frozenset[int]:
    """Return the steps (0-based) whose batches are left out; one process reads them for all ranks, whose caches of a
    shared disk may differ. Raises CheckpointError if the file is damaged."""
    path = output_dir / run_files.EXCLUDED_STEPS
    if not path.exists():
        return frozenset()
    steps = read_json(path, kind=list, error=CheckpointError)
    if not all(isinstance(step, int) and step >= 0 for step in steps):
        hint = "remove it to train the batches that were left out, or correct it"
        raise CheckpointError("it is not a list of steps", where=path, hint=hint)
    return frozenset(steps)


def leave_out(output_dir: Path, step: int) -> list[int]:
    """Record a step whose batch is left out from now on; return all of them. On rank 0 only."""
    check_owner(output_dir)
    steps = sorted(excluded_steps(output_dir) | {step})
    write_json(output_dir / run_files.EXCLUDED_STEPS, steps)
    return steps


def steps_to_leave_out(output_dir: Path, checkpoint: Path | None) -> list[int]:
    """Return the steps that this start leaves out; on rank 0 only. Remove the record of an earlier run if this one
    does not continue from a checkpoint of the folder."""
    if checkpoint is None or real_path(checkpoint.parent) != real_path(output_dir):
        with disk_errors(output_dir / run_files.EXCLUDED_STEPS):
            (output_dir / run_files.EXCLUDED_STEPS).unlink(missing_ok=True)
    return sorted(excluded_steps(output_dir))
