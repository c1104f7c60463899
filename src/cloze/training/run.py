"""The objects of a run: `Run`, and its starting point: `Start`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cloze.config import TrainConfig
from cloze.data.batches.masking import Masking
from cloze.data.train_data import TrainData
from cloze.distributed.resilience.stop_signals import StopSignals
from cloze.distributed.resilience.watchdog import Watch
from cloze.model.sparse_head import MaskedHead
from cloze.training.checkpointing.saver import CheckpointSaver
from cloze.training.engines.base import Engine
from cloze.training.logging.metrics import Throughput
from cloze.training.run_schedule import Plan


@dataclass(frozen=True)
class Start:
    """Where training starts: steps done, this rank's place in streamed data, whether that step is to be evaluated."""

    step: int
    stream_position: dict[str, int] | None = None
    evaluate: bool = False


@dataclass
class Run:
    """The objects and state of one run. `saved`: step of the newest checkpoint that this process has saved or loaded,
    and whether its evaluation was pending; `excluded_steps`: steps whose batches are left out; `capacity`: places to
    predict in a micro-batch of fixed shape, else 0; `max_async_steps`: steps in flight before the host reads the first
    one's result; `nonfinite_in_a_row`: number of last steps skipped in a row.
    """

    config: TrainConfig
    output_dir: Path
    data: TrainData
    masking: Masking
    plan: Plan
    engine: Engine
    identity: dict[str, Any]
    checkpoint: Path | None
    saver: CheckpointSaver
    schedule: Callable[[int], float]
    probe: dict[str, torch.Tensor]
    head: MaskedHead
    capacity: int
    stop: StopSignals
    watch: Watch
    excluded_steps: frozenset[int]
    pace: Throughput
    max_async_steps: int
    saved: tuple[int, bool] | None = None
    nonfinite_in_a_row: int = 0
