"""`cloze bench save`: measure how long training waits for a checkpoint, and how long resuming takes.

One process, the training state of a model of any size (AdamW), the same disk for all: a blocking save, saves in the
background, and the same state written with `torch.save`, as other loops do. Then it is verified and loaded again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForMaskedLM

from cloze.checkpoint.format import Position, read_manifest, verify_checkpoint
from cloze.checkpoint.reader import PieceReader
from cloze.config import BenchConfig
from cloze.data.batches.layout import Layout
from cloze.model.overrides import apply_overrides, parse_overrides
from cloze.tools.bench.folder import work_folder
from cloze.tools.bench.table import Table
from cloze.training.checkpointing.restore import load_state
from cloze.training.checkpointing.saver import CheckpointSaver
from cloze.training.engines.base import Engine
from cloze.training.engines.choose_engine import engine_for
from cloze.training.optim.optimizers import decay_groups
from cloze.utils.memory import PeakMemory
from cloze.utils.terminal.console import say

REPEATS = 3
ABOUT = {"run": {}, "config": {}, "precision": "no"}  # keys of every checkpoint.json


def bench_save(config: BenchConfig) -> Table:
    """Save, load, and return the table; times are medians of three."""
    engine = make_engine(config)
    elements = sum(p.numel() for p in engine.module.parameters())
    say("bench", f"{elements / 1e6:.0f}M parameters")
    with work_folder(config.work_dir) as folder:
        table = Table(
            f"{elements / 1e6:.0f}M parameters and AdamW's state, {elements * 12 / 1e9:.1f} GB, 1 process",
            ["what", "training waits, s", "until on the disk, s", "more memory, GB"],
        )
        for name, row in (
            ("torch.save, flushed", _torch_save(engine, folder)),
            ("cloze, blocking", _saves(engine, folder / "blocking", in_background=False)),
            ("cloze, --async_save, the first one", _saves(engine, folder / "first", True, repeats=1)),
            ("cloze, --async_save, after that", _saves(engine, folder / "later", True)),
        ):
            table.add(name, *row)
        checkpoint = sorted((folder / "blocking").glob("checkpoint-*"))[-1]
        seconds, _ = _timed(lambda: verify_checkpoint(checkpoint))
        table.add("verify all checksums", seconds, None, None)
        seconds, grown = _timed(lambda: _load(engine, checkpoint))
        table.add("load it, compare checksums", seconds, None, grown)
        return table


def make_engine(config: BenchConfig) -> Engine:
    """Return a model with random weights, and its optimizer after a first step."""
    model_config = AutoConfig.for_model(config.model_type)
    apply_overrides(model_config, parse_overrides(config.config_overrides))
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(model_config, dtype=torch.float32)
    optimizer = torch.optim.AdamW([group for group, _ in decay_groups(model, 0.01)], lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return engine_for(Accelerator(cpu=True)).prepare(model, optimizer, Layout(1, 1, 0, 1), 0.0)


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return seconds, and peak memory in gigabytes."""
    with PeakMemory() as peak:
        begin = time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
    return seconds, peak.grown / 1e9


def _median(rows: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    first, second, third = (sorted(column)[len(rows) // 2] for column in zip(*rows, strict=True))
    return first, second, third


def _torch_save(engine: Engine, folder: Path) -> tuple[float, float, float]:
    state = {"model": engine.module.state_dict(), "optimizer": engine.optimizer.state_dict()}

    def write() -> None:
        with open(folder / "state.pt", "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())

    rows = []
    for _ in range(REPEATS):
        seconds, grown = _timed(write)
        rows.append((seconds, seconds, grown))
        (folder / "state.pt").unlink()
    return _median(rows)


def _saves(engine: Engine, folder: Path, in_background: bool, repeats: int = REPEATS) -> tuple[float, float, float]:
    """Return medians over several saves. In the background, the first one, which allocates the buffers, is not
    counted."""
    saver = CheckpointSaver(engine, lambda path: path.mkdir(parents=True), in_background)
    rows = []
    for number in range(repeats + (in_background and repeats > 1)):
        position = Position(number + 1, 0, 0)
        with PeakMemory() as peak:
            begin = time.perf_counter()
            saver.save(folder / f"checkpoint-{number + 1}", position, {}, ABOUT, keep=1)
            waited = time.perf_counter() - begin
            saver.wait()
            rows.append((waited, time.perf_counter() - begin, 0.0))
        rows[-1] = (*rows[-1][:2], peak.grown / 1e9)
    return _median(rows[-repeats:])


def _load(engine: Engine, checkpoint: Path) -> None:
    with PieceReader(checkpoint, read_manifest(checkpoint)) as pieces:
        load_state(engine, pieces)
