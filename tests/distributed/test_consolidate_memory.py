"""Consolidation takes the memory of a few tensors, not of a model, check included: measured."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic
from ranks import in_fresh_process, run_ranks, succeed

# 13 M parameters, of which the largest tensor is 1 MB: what is not a few tensors shows.
MANY_SMALL = "hidden_size=256,num_hidden_layers=16,num_attention_heads=4,intermediate_size=1024,vocab_size=1000"
# 1.0 billion parameters; the embeddings are 309 MB.
BILLION = "hidden_size=1536,num_hidden_layers=32,num_attention_heads=16,intermediate_size=6144"
M_MMAP_THRESHOLD = -3  # malloc.h
SLACK = 12e6  # the batch, its logits and chunks of checksums, for the small model


def make(folder: str, tokenizer: str, overrides: str) -> None:
    model = synthetic.make_model(overrides)
    synthetic.write_own(model, Path(tokenizer), Path(folder) / "own" / "checkpoint-1")
    synthetic.write_zero3(model, Path(folder) / "zero3")
    write_dcp(model, Path(folder) / "dcp")
    numbers = [p.numel() for p in model.parameters()]
    (Path(folder) / "size.json").write_text(json.dumps([sum(numbers), max(numbers)]))


def write_dcp(model: Any, folder: Path) -> None:
    """What torch.distributed.checkpoint writes."""
    import torch.distributed.checkpoint as dcp

    dcp.save(model.state_dict(), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def consolidate(checkpoint: str, output: str, **more: str) -> None:
    from cloze.cli.commands import consolidate
    from cloze.config import ConsolidateConfig

    consolidate.run(ConsolidateConfig(checkpoint=checkpoint, output=output, **more))


def zero_to_fp32(checkpoint: str, output: str) -> None:
    """DeepSpeed's own, with its defaults."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(checkpoint, output)


def measured(work: Callable[..., None], report: str, **how: str) -> None:
    """In a process of its own: write down the bytes and seconds that a function took."""
    from cloze.utils.memory import PeakMemory

    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # what is freed goes back to the system
    begin = time.monotonic()
    with PeakMemory() as peak:
        work(**how)
    Path(report).write_text(json.dumps([peak.grown, time.monotonic() - begin]))


def measure(work: Callable[..., None], folder: Path, **how: str) -> tuple[int, float]:
    report = folder / "report.json"
    in_fresh_process(measured_alone, work, folder, str(report), how)
    return tuple(json.loads(report.read_text()))


def measured_alone(work: Callable[..., None], folder: Path, report: str, how: dict[str, str]) -> None:
    succeed(run_ranks(measured, 1, folder / "log", work=work, report=report, timeout=1500, **how))


def checkpoints(folder: Path, prepared: Path, overrides: str) -> tuple[int, int]:
    """Write both; number of parameters, and of those in the largest tensor."""
    tokenizer = str(prepared.parent / "tokenizer")
    succeed(
        run_ranks(make, 1, folder / "log", folder=str(folder), tokenizer=tokenizer, overrides=overrides, timeout=900)
    )
    return tuple(json.loads((folder / "size.json").read_text()))


def foreign(folder: Path, prepared: Path, kind: str = "zero3") -> dict[str, str]:
    names = {"config_name": folder / "zero3" / "config", "tokenizer_name": prepared.parent / "tokenizer"}
    return {"checkpoint": str(folder / kind), **{name: str(path) for name, path in names.items()}}


@pytest.fixture(scope="module")
def small(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    folder = tmp_path_factory.mktemp("small")
    return folder, *checkpoints(folder, prepared, MANY_SMALL)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("own", "bf16"), *(pytest.param(kind, "fp32", marks=pytest.mark.slow) for kind in ("zero3", "dcp"))],
)
def test_memory_is_that_of_a_few_tensors_not_of_the_model(small, prepared, tmp_path, kind: str, dtype: str, figure):
    folder, parameters, largest = small
    assert 4 * parameters > 3 * (4 * 4 * largest + SLACK)
    how = {"checkpoint": str(folder / "own")} if kind == "own" else foreign(folder, prepared, kind)
    grown, _ = measure(consolidate, tmp_path, output=str(tmp_path / "model"), dtype=dtype, **how)
    name = {"own": "Cloze", "zero3": "DeepSpeed", "dcp": "torch.distributed.checkpoint"}[kind]
    figure(f"consolidating 53 MB of {name} into {dtype}: MB at most", grown / 1e6)
    assert grown < 4 * 4 * largest + SLACK


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_billion_parameters_beside_deepspeeds_own_tool(prepared: Path, tmp_path: Path, figure):
    """Takes 20 GB of disk and, while the checkpoints are made, 6 GB of memory."""
    parameters, largest = checkpoints(tmp_path, prepared, BILLION)
    assert parameters > 0.98e9
    ways = {
        "Cloze, its own checkpoint": (consolidate, {"checkpoint": str(tmp_path / "own")}),
        "Cloze, DeepSpeed's checkpoint": (consolidate, foreign(tmp_path, prepared)),
        "DeepSpeed's zero_to_fp32": (zero_to_fp32, {"checkpoint": str(tmp_path / "zero3")}),
    }
    for name, (function, how) in ways.items():
        grown, seconds = measure(function, tmp_path, output=str(tmp_path / "model"), **how)
        figure(f"1.0 billion parameters, {name}: GB of memory", grown / 1e9)
        figure(f"1.0 billion parameters, {name}: seconds", seconds)
        succeed(run_ranks(_remove, 1, tmp_path / "log", folder=str(tmp_path / "model")))
        if function is consolidate:
            assert grown < 4 * 4 * largest + 500e6, name


def _remove(folder: str) -> None:
    import shutil

    shutil.rmtree(folder)
