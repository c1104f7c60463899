"""A disk that fills up while a checkpoint is saved stops the run with one line and leaves the last good one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from ranks import cloze_ranks

from cloze.train.checkpoint_files import verify_checkpoint


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("engine", "world_size"), [("single", 1), ("zero2", 2)])
def test_a_full_disk_stops_cleanly(prepared: Path, tmp_path: Path, small_disk: Path, engine: str, world_size: int):
    flags = [*TINY_MODEL, "--max_steps", "50", "--save_steps", "1", "--dataset_name", str(prepared)]
    flags += ["--output_dir", str(small_disk / "run")]
    outcomes = cloze_ranks(["train", *flags], world_size, engine, tmp_path / "log")
    assert [outcome.code for outcome in outcomes] == [2] * world_size, outcomes[0].output
    lines = [line for line in outcomes[0].output.splitlines() if line.startswith("cloze: error: ")]
    assert len(lines) == 1
    assert "No space left on device; free some space" in lines[0]
    checkpoints = sorted(path.name for path in (small_disk / "run").glob("checkpoint-*"))
    assert checkpoints
    assert not any("tmp" in name for name in checkpoints)
    for name in checkpoints:
        verify_checkpoint(small_disk / "run" / name)
