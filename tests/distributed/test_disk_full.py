"""A disk that fills up while a checkpoint is saved stops the run with one line and leaves the last good one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from ranks import cloze_ranks

from cloze.checkpoint.format import verify_checkpoint


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


def filled_between(disk: Path, first: int, last: int) -> Callable[[], None]:
    """To be called in a rank: rank 0 fills the disk before step `first`, and makes room again before step `last`."""

    def install() -> None:
        from cloze.training import trainer

        plain, filler = trainer.train_step, disk / "filler"

        def train_step(run, batch):
            if batch.global_step in (first - 1, last - 1) and run.saver._thread is not None:
                run.saver._thread.join()  # what is being written has its end before the disk changes
            if run.plan.layout.rank == 0 and batch.global_step == first - 1:
                with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(4096))
            if run.plan.layout.rank == 0 and batch.global_step == last - 1:
                filler.unlink()
            return plain(run, batch)

        trainer.train_step = train_step

    return install


FILLED = [*TINY_MODEL, "--max_steps", "8", "--save_steps", "1", "--save_total_limit", "1", "--logging_steps", "1"]


@pytest.mark.parametrize("more", [[], ["--async_save"]], ids=["", "async"])
@pytest.mark.parametrize(("engine", "world_size"), [pytest.param("ddp", 2, marks=pytest.mark.slow), ("zero3", 2)])
def test_training_goes_on_until_there_is_room_again(prepared, tmp_path, small_disk, engine, world_size, more):
    run = small_disk / "run"
    argv = ["train", *FILLED, *more, "--dataset_name", str(prepared), "--output_dir", str(run)]
    outcomes = cloze_ranks(argv, world_size, engine, tmp_path / "log", filled_between(small_disk, 3, 6))
    assert [outcome.code for outcome in outcomes] == [0] * world_size, outcomes[0].output
    warned = [line for line in outcomes[0].output.splitlines() if "the checkpoint was not saved" in line]
    assert len(warned) == 3, outcomes[0].output
    assert all("No space left on device; free some space" in line for line in warned)
    assert "training continues (--on_save_error)" in warned[0]
    assert "Traceback" not in outcomes[0].output + outcomes[1].output
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-8"]
    verify_checkpoint(run / "checkpoint-8")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert json.loads((run / "status.json").read_text())["status"] == "finished"


def log_to_a_full_disk() -> None:
    """To be called in a rank: what it prints from now on is not taken."""
    for descriptor in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)


@pytest.mark.parametrize("more", [[], ["--log_format", "json"]], ids=["", "json"])
def test_a_log_on_a_full_disk_does_not_end_a_run(prepared: Path, tmp_path: Path, more: list[str]):
    argv = ["train", *TINY_MODEL, *more, "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no"]
    argv += ["--dataset_name", str(prepared), "--output_dir", str(tmp_path / "run")]
    outcomes = cloze_ranks(argv, 1, "single", tmp_path / "log", log_to_a_full_disk)
    assert [outcome.code for outcome in outcomes] == [0]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "more", [pytest.param([], id="", marks=pytest.mark.slow), pytest.param(["--async_save"], id="async")]
)
def test_or_stops_where_it_is_told_to(prepared, tmp_path, small_disk, more):
    run = small_disk / "run"
    argv = ["train", *FILLED, *more, "--on_save_error", "stop", "--dataset_name", str(prepared)]
    outcomes = cloze_ranks(
        [*argv, "--output_dir", str(run)], 2, "zero2", tmp_path / "log", filled_between(small_disk, 3, 9)
    )
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes[0].output
    lines = [line for line in outcomes[0].output.splitlines() if line.startswith("cloze: error: ")]
    assert len(lines) == 1
    assert "No space left on device; free some space" in lines[0]
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    verify_checkpoint(run / "checkpoint-2")
