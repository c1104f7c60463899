"""What ranks really trained on, and ways to disturb them at a chosen step."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cloze.data.batches.layout import Layout
from cloze.data.batches.loader import step_batches
from cloze.data.batches.masking import Masking
from cloze.data.prepared.shards import open_prepared


def record(folder: Path, disturb: Callable[[int, int], None] | None = None) -> Callable[[], None]:
    """To be called in a rank: from then on each training step writes down what it was given.

    `disturb`: called with (global_step, rank) before each step.
    """

    def install() -> None:
        from cloze.training import trainer

        plain = trainer.train_step

        @functools.wraps(plain)
        def recorded(run, batch):
            layout = run.plan.layout
            if disturb is not None:
                disturb(batch.global_step, layout.rank)
            lines = []
            for micro_step, micro_batch in enumerate(batch.micro_batches):
                for row, sample in enumerate(layout.samples(batch.global_step, micro_step).tolist()):
                    if sample >= 0:
                        ids, labels = micro_batch["input_ids"][row], micro_batch["labels"][row]
                        lines.append(f"{batch.global_step} {sample} {digest(ids.numpy(), labels.numpy())}\n")
            result = plain(run, batch)
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{os.getpid()}.txt", "a") as file:
                file.write("".join(lines))
            return result

        trainer.train_step = recorded

    return install


def digest(ids: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes() + labels.astype("<i8").tobytes()).hexdigest()


def recorded_steps(folder: Path) -> dict[int, dict[int, str]]:
    """step -> sample -> digest of its tokens and labels. A step that was trained on twice must be the same twice."""
    steps: dict[int, dict[int, str]] = {}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            step, sample, what = line.split()
            samples = steps.setdefault(int(step), {})
            assert samples.setdefault(int(sample), what) == what, f"sample {sample} was not the same twice"
    return steps


def expected_steps(
    prepared: Path, seed: int, global_batch: int, steps: int, total_samples: int = 10**9
) -> dict[int, dict[int, str]]:
    """The same for an undisturbed run on one rank, worked out from the data alone."""
    data = open_prepared(prepared)
    masking = Masking.from_manifest(data.manifest, seed)
    found: dict[int, dict[int, str]] = {}
    for step in range(steps):
        batch = step_batches(data.blocks("train"), masking, Layout(global_batch, 1, 0, 1), total_samples, step)
        rows = batch.micro_batches[0]
        found[step] = {
            step * global_batch + row: digest(rows["input_ids"][row].numpy(), rows["labels"][row].numpy())
            for row in range(global_batch)
        }
    return found


def stop_at(step: int, rank: int, number: int = signal.SIGTERM) -> Callable[[int, int], None]:
    """A disturbance: one rank gets a signal before a step."""

    def disturb(global_step: int, this_rank: int) -> None:
        if (global_step, this_rank) == (step, rank):
            os.kill(os.getpid(), number)

    return disturb
