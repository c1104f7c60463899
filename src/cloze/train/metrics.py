"""What a run reports: lines of metrics.jsonl, and the same numbers to the trackers of accelerate.

log = MetricsLog(output_dir, accelerator, start_step=120)     # lines after step 120 are dropped: they come again
log.write({"step": 130, "loss": 5.1, ...})
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from cloze.data.loader import StepBatches, TrainLoader
from cloze.events import event, is_json
from cloze.files import disk_errors, write_text
from cloze.train.plan import Plan
from cloze.train.run_owner import check_owner
from cloze.train.trackers import report, tracker_values

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to metrics.jsonl and to the trackers; on the main process only."""

    def __init__(self, output_dir: Path, accelerator: Accelerator, start_step: int):
        self._path = output_dir / FILE
        self._accelerator = accelerator
        if accelerator.is_main_process:
            check_owner(output_dir)
            kept = [line for line in read_metrics(output_dir) if line["step"] <= start_step]
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept if start_step))

    def write(self, values: dict[str, Any]) -> None:
        """One line: `step` and any numbers; NaN and infinity become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        if self._accelerator.is_main_process:
            check_owner(self._path.parent)
            with disk_errors(self._path), open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
            if is_json():
                event("metrics", **clean)
        report(tracker_values(clean), step=values["step"])


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut short is left out."""
    path = output_dir / FILE
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class Window:
    """The steps since the last line of metrics: their losses and masked tokens, which stay on the device, and the time
    they took."""

    def __init__(self, first_step: int, device: torch.device):
        self.first_step, self._device = first_step, device
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._begin, self._waited = time.perf_counter(), 0.0

    def add(self, loss: torch.Tensor, refused: torch.Tensor, num_masked: torch.Tensor) -> None:
        """Add a step, with this rank's part of its loss and the masked tokens of all ranks. One that was refused, or
        without a masked token, has no loss. All scalars on the device: nothing waits for them."""
        counts = ~refused & (num_masked > 0)
        step = torch.stack([torch.where(counts, loss, 0.0), counts.double(), num_masked.double()])
        self.sums += step

    def timed(self, loader: TrainLoader) -> Iterator[StepBatches]:
        """The loader's items; the time spent waiting for them counts as `data_wait`."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def close(self, done: int, sums: list[float], plan: Plan, pace: Pace) -> dict[str, float | None]:
        """The window's numbers, and the next window begins. `sums`: those of all ranks, as [loss, steps, masked]."""
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
class Pace:
    """What speed is measured by. `token_flops`: floating-point operations of one device for each token of the global
    batch (see `cloze.model.flops`; None where they cannot be counted), `peak_flops`: what the device could do in a
    second, None where that is not known; `filled`: share of a block that is no padding."""

    token_flops: float | None
    peak_flops: float | None
    filled: float = 1.0


def peak_memory(device: torch.device) -> int:
    """Bytes at their highest so far: of tensors on the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
