"""What a run reports: lines of metrics.jsonl, and the same numbers to the trackers of accelerate.

log = MetricsLog(output_dir, accelerator, start_step=120)     # lines after step 120 are dropped: they come again
log.write({"step": 130, "loss": 5.1, ...})
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from cloze.data.loader import StepBatches, TrainLoader
from cloze.files import disk_errors, write_text
from cloze.train.plan import Plan

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to metrics.jsonl and to the trackers; on the main process only."""

    def __init__(self, output_dir: Path, accelerator: Accelerator, start_step: int):
        self._path = output_dir / FILE
        self._accelerator = accelerator
        if accelerator.is_main_process:
            kept = [line for line in read_metrics(output_dir) if line["step"] <= start_step]
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept if start_step))

    def write(self, values: dict[str, Any]) -> None:
        """One line: `step` and any numbers; NaN and infinity become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        if self._accelerator.is_main_process:
            with disk_errors(self._path), open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
        named = {_tracker_name(k): v for k, v in clean.items() if k != "step" and isinstance(v, int | float)}
        self._accelerator.log(named, step=values["step"])


def _tracker_name(key: str) -> str:
    """`eval_perplexity` -> `eval/perplexity`, `loss` -> `train/loss`, as transformers names them."""
    return f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"


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
    """The steps since the last line of metrics: their losses, and the time they took."""

    def __init__(self, first_step: int, device: torch.device):
        self.first_step = first_step
        self.steps, self.loss = 0, torch.zeros((), dtype=torch.float64, device=device)
        self._begin, self._waited = time.perf_counter(), 0.0

    def add(self, loss: torch.Tensor) -> None:
        """One more step that counts, with this rank's part of its loss."""
        self.loss += loss
        self.steps += 1

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

    def speed(self, done: int, plan: Plan) -> dict[str, float]:
        """Tokens per second of all ranks, and the share of time spent waiting for data; starts the next window."""
        elapsed = max(time.perf_counter() - self._begin, 1e-9)
        tokens = plan.position(done).tokens_seen - plan.position(self.first_step).tokens_seen
        values = {"tokens_per_second": round(tokens / elapsed, 1), "data_wait": round(self._waited / elapsed, 4)}
        self.first_step, self._begin, self._waited, self.steps = done, time.perf_counter(), 0.0, 0
        self.loss.zero_()
        return values
