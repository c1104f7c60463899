"""Metrics of a run: lines of metrics.jsonl, and the same numbers to accelerate's trackers.

log = MetricsLog(output_dir, accelerator, start_step=120)     # removes lines after step 120, which are repeated
log.write({"step": 130, "loss": 5.1, ...})
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from cloze.checkpoint.run_folder import read_metrics
from cloze.data.batches.loader import StepBatches, TrainLoader
from cloze.distributed.resilience.run_owner import check_owner
from cloze.training.logging.trackers import report, tracker_values
from cloze.training.run_schedule import Plan
from cloze.utils import run_files
from cloze.utils.atomic_files import append_text, auxiliary_write, disk_errors, write_text
from cloze.utils.foreign.json_yaml import dump_json, finite, read_json_lines
from cloze.utils.terminal.console import warn
from cloze.utils.terminal.json_events import event, is_json

MOST_UNWRITTEN = 100_000  # lines kept in memory while the file cannot be written: about 30 MB


class MetricsLog:
    """Appends to metrics.jsonl and to the trackers, on the main process only."""

    def __init__(self, output_dir: Path, accelerator: Accelerator, start_step: int):
        self._path = output_dir / run_files.METRICS
        self._accelerator = accelerator
        self._unwritten: deque[tuple[int, str]] = deque()
        self._size: int | None = None  # of the file, up to the last complete line
        self._dropped = 0
        if accelerator.is_main_process:
            self._cut(start_step)

    def rewind(self, start_step: int) -> None:
        """Remove the lines after a step, which will be repeated."""
        if self._accelerator.is_main_process:
            self._unwritten = deque(one for one in self._unwritten if one[0] <= start_step)
            with auxiliary_write(self._path):
                self._cut(start_step)

    def _cut(self, start_step: int) -> None:
        """Truncate the file if that suffices, because a full disk allows it; else rewrite it. Raises DiskError."""
        check_owner(self._path.parent)
        kept = [line for line in read_metrics(self._path.parent) if line["step"] <= start_step]
        keep_damaged(self._path)
        text = "".join(dump_json(line) + "\n" for line in kept if start_step)
        data, self._size = text.encode("utf-8"), None
        with disk_errors(self._path):
            begins_so = self._path.is_file() and self._path.read_bytes().startswith(data)
            if begins_so:
                os.truncate(self._path, len(data))
        if not begins_so:
            write_text(self._path, text)
        self._size = len(data)

    def write(self, values: dict[str, Any]) -> None:
        """Write one line: `step` and any numbers; NaN and infinity become null."""
        clean: dict[str, Any] = finite(values)
        if self._accelerator.is_main_process:
            self._unwritten.append((values["step"], dump_json(clean) + "\n"))
            if len(self._unwritten) > MOST_UNWRITTEN:
                self._unwritten.popleft()
                self._dropped += 1
            self._write_out()
            if is_json():
                event("metrics", **clean)
        report(tracker_values(clean), step=values["step"])

    def _write_out(self) -> None:
        """Append the lines that are not in the file yet, in order; keep those that cannot be written."""
        with auxiliary_write(self._path):
            check_owner(self._path.parent)
            self._size = append_text(self._path, "".join(line for _, line in self._unwritten), self._size)
            self._unwritten.clear()

    def close(self) -> None:
        """Write the remaining lines, or report how many are lost."""
        if self._unwritten:
            self._write_out()
        lost = self._dropped + len(self._unwritten)
        if lost:
            warn(f"{self._path}: {lost:,} line{'s' * (lost > 1)} could not be written")


def keep_damaged(path: Path) -> None:
    """Copy a metrics file with damaged lines to NAME.damaged-N, before it is rewritten. Raises DiskError."""
    damaged = read_json_lines(path, "step")[1] if path.exists() else []
    if not damaged:
        return
    number = 1
    while (copy := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    with disk_errors(copy):
        shutil.copyfile(path, copy, follow_symlinks=False)
    warn(f"{path}: the file with its damaged lines is kept as {copy.name}")


class Window:
    """The steps since the last line of metrics: losses and masked tokens, kept on the device, and their time."""

    def __init__(self, first_step: int, device: torch.device):
        self.first_step, self._device = first_step, device
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._begin, self._waited = time.perf_counter(), 0.0

    def add(self, loss: torch.Tensor, refused: torch.Tensor, num_masked: torch.Tensor) -> None:
        """Add a step: this rank's part of its loss and the masked tokens of all ranks. A skipped step, or one without
        a masked token, has no loss. All scalars stay on the device: the host does not wait."""
        counts = ~refused & (num_masked > 0)
        step = torch.stack([torch.where(counts, loss, 0.0), counts.double(), num_masked.double()])
        self.sums += step

    def timed(self, loader: TrainLoader) -> Iterator[StepBatches]:
        """Yield the loader's items; count the time spent waiting for them as `data_wait`."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def close(self, done: int, sums: list[float], plan: Plan, pace: Throughput) -> dict[str, float | None]:
        """Return the window's numbers and start the next window. `sums`: over all ranks, [loss, steps, masked]."""
        elapsed = max(time.perf_counter() - self._begin, 1e-9)
        tokens = plan.position(done).tokens_seen - plan.position(self.first_step).tokens_seen
        operations = pace.token_flops * tokens / elapsed if pace.token_flops else None
        values = {
            "loss": sums[0] / sums[1] if sums[1] else None,
            "seconds": round(elapsed, 3),
            "tokens_per_second": round(tokens * pace.filled / elapsed, 1),
            "masked_tokens_per_second": round(sums[2] / elapsed, 1),
            "tflops": None if operations is None else round(operations / 1e12, 3),
            "mfu": None if operations is None or pace.peak_flops is None else round(operations / pace.peak_flops, 4),
            "data_wait": round(self._waited / elapsed, 4),
            "memory_gib": round(peak_memory(self._device) / 2**30, 3),
        }
        self.first_step, self._begin, self._waited = done, time.perf_counter(), 0.0
        self.sums.zero_()
        return values


@dataclass(frozen=True)
class Throughput:
    """Constants for throughput. `token_flops`: floating-point operations of one device per token of the global batch
    (see `cloze.model.flops`), None if they cannot be counted; `peak_flops`: of the device per second, None if unknown;
    `filled`: share of a block that is not padding."""

    token_flops: float | None
    peak_flops: float | None
    filled: float = 1.0


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes so far: of tensors on the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
