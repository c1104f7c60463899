"""A rank that dies, fails or hangs is named within seconds, by rank, host and phase; the next start goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from ranks import at_call, cloze_ranks, entering, start_ranks, succeed, wait_for

from cloze.errors import TrainingError

FLAGS = [*TINY_MODEL, "--max_steps", "6", "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-3"]


def flags(prepared: Path, output: Path, *more: str) -> list[str]:
    where = ["--dataset_name", str(prepared), "--output_dir", str(output), "--resume_from_checkpoint", "auto"]
    return ["train", *FLAGS, *where, *more]


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.match(r"(\[rank \d+ @ \S+\] )?cloze: error: ", line)]


def error_json(run: Path) -> dict:
    return json.loads((run / "error.json").read_text())


def killed_after_a_while() -> None:
    time.sleep(1.5)  # so that the others know its step
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("engine", "dead"),
    [
        ("ddp", 0),
        pytest.param("ddp", 1, marks=pytest.mark.slow),
        ("ddp", 2),
        pytest.param("zero3", 0, marks=pytest.mark.slow),
        ("zero3", 1),
        pytest.param("zero3", 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank(prepared: Path, tmp_path: Path, engine: str, dead: int):
    """The others end in seconds with one line, no traceback, and a code that says: start again."""
    argv = flags(prepared, tmp_path / "run")
    before = at_call("cloze.training.trainer", "masked_loss_sum", 4, killed_after_a_while, rank=dead)
    begin = time.monotonic()
    outcomes = cloze_ranks(argv, 3, engine, tmp_path / "a", before)
    assert time.monotonic() - begin < 60
    assert [outcome.code for outcome in outcomes] == [-9 if rank == dead else 75 for rank in range(3)]
    output = "".join(outcome.output for rank, outcome in enumerate(outcomes) if rank != dead)
    assert "Traceback" not in output
    told = errors(output)
    assert len(told) == 1, output
    assert (
        f"rank {dead} on {socket.gethostname()} died in train, step 3; --resume_from_checkpoint auto resumes"
        in told[0]
    )
    kept = error_json(tmp_path / "run")
    first = {name: kept[name] for name in ("rank", "host", "phase", "step", "kind", "exit_code")}
    host = socket.gethostname()
    assert first == {"rank": dead, "host": host, "phase": "train", "step": 3, "kind": "LostRank", "exit_code": 75}
    assert kept["error"] == f"rank {dead} on {host} died in train, step 3"
    assert sorted(other["rank"] for other in kept["others"]) == [rank for rank in range(3) if rank != dead]
    assert all(f"rank {dead} on" in other["error"] for other in kept["others"])
    succeed(cloze_ranks(argv, 3, engine, tmp_path / "b"))
    assert not [name for name in ("error.json", "errors") if (tmp_path / "run" / name).exists()]


def test_a_rank_that_fails_is_quoted(prepared: Path, tmp_path: Path):
    def fail() -> None:
        raise ValueError("no good")

    before = at_call("cloze.training.trainer", "masked_loss_sum", 4, fail)
    outcomes = cloze_ranks(flags(prepared, tmp_path / "run"), 2, "zero2", tmp_path / "a", before)
    assert outcomes[1].code == 1
    assert "ValueError: no good" in outcomes[1].output
    assert outcomes[0].code == 1
    told = errors(outcomes[0].output)
    assert len(told) == 1
    assert f"rank 1 on {socket.gethostname()} failed in train, step 3: ValueError: no good" in told[0]
    assert "Traceback" not in outcomes[0].output
    text = outcomes[1].output
    assert [line for line in text.splitlines() if not line.startswith(f"[rank 1 @ {socket.gethostname()}] ")] == []
    assert text.count("Traceback (most recent call last)") == 1
    kept = error_json(tmp_path / "run")
    assert (kept["rank"], kept["phase"], kept["step"], kept["exit_code"]) == (1, "train", 3, 1)
    assert (kept["kind"], kept["error"]) == ("ValueError", "ValueError: no good")
    assert [(other["rank"], other["kind"]) for other in kept["others"]] == [(0, "LostRank")]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("kind", [TrainingError, ValueError])
def test_an_error_of_all_ranks_at_once_is_told_once_by_rank_0(prepared: Path, tmp_path: Path, kind: type[Exception]):
    def fail() -> None:
        raise kind("no rank can go on")

    def on_every_rank() -> None:
        for rank in range(2):
            at_call("cloze.training.trainer", "train_step", 3, fail, rank)()

    outcomes = cloze_ranks(flags(prepared, tmp_path / "run"), 2, "ddp", tmp_path / "a", on_every_rank)
    expected = 2 if kind is TrainingError else 1
    assert [outcome.code for outcome in outcomes] == [expected] * 2, outcomes[0].output
    line = "no rank can go on" if kind is TrainingError else "ValueError: no rank can go on"
    assert errors(outcomes[0].output) == [f"cloze: error: {line} (and on rank 1)"]
    if kind is TrainingError:
        assert outcomes[1].output == ""
    else:
        told = f"[rank 1 @ {socket.gethostname()}] cloze: error: {line} (as on rank 0)\n"
        assert outcomes[1].output == told
        assert outcomes[0].output.count("Traceback (most recent call last)") == 1
    kept = error_json(tmp_path / "run")
    assert (kept["rank"], kept["phase"], kept["step"], kept["error"]) == (0, "train", 2, line)
    assert [(other["rank"], other["error"]) for other in kept["others"]] == [(1, line)]


def wait_for_ever_in_here() -> None:
    time.sleep(1000)


@pytest.mark.parametrize(("world_size", "engine"), [(1, "ddp"), (2, "zero2")])
def test_a_hang_ends_with_the_stacks_of_all_ranks(prepared: Path, tmp_path: Path, world_size: int, engine: str):
    rank = world_size - 1

    argv = flags(prepared, tmp_path / "run", "--hang_timeout", "5")
    begin = time.monotonic()
    before = at_call("cloze.training.trainer", "masked_loss_sum", 4, wait_for_ever_in_here, rank)
    outcomes = cloze_ranks(argv, world_size, engine, tmp_path / "a", before)
    assert time.monotonic() - begin < 60
    assert {outcome.code for outcome in outcomes} == {75}, outcomes[0].output
    told = errors(outcomes[0].output)
    assert len(told) == 1
    assert "no progress for 5 s (--hang_timeout)" in told[0]
    stacks = [(tmp_path / "run" / "stacks" / f"rank-{each}.txt").read_text() for each in range(world_size)]
    assert "wait_for_ever_in_here" in stacks[rank]
    assert all("train_step" in text for text in stacks)
    kept = error_json(tmp_path / "run")
    assert (kept["rank"], kept["phase"], kept["step"], kept["exit_code"]) == (rank, "train", 3, 75)
    assert re.match(r"no progress for \d+ s \(--hang_timeout\)", kept["error"])
    assert len(kept["others"]) == world_size - 1
    if world_size > 1:
        lines = stacks[1].splitlines()
        assert all(line.startswith(f"[rank 1 @ {socket.gethostname()}]") for line in lines)


@pytest.mark.slow
def test_a_rank_that_does_not_answer_within_ddp_timeout(prepared: Path, tmp_path: Path):
    """It lives, and says so, but it waits for something else than the others do."""
    argv = flags(prepared, tmp_path / "run", "--ddp_timeout", "5")
    before = at_call("cloze.training.trainer", "masked_loss_sum", 4, wait_for_ever_in_here)
    outcomes = cloze_ranks(argv, 2, "ddp", tmp_path / "a", before, timeout=60)
    assert [outcome.code for outcome in outcomes] == [75, 75], outcomes[0].output
    told = errors(outcomes[0].output)
    assert len(told) == 1
    assert (
        f"rank 0 on {socket.gethostname()} got no answer from other ranks in train, step 3 (--ddp_timeout 5)"
        in told[0]
    )
    assert f"last heard: rank 1 on {socket.gethostname()}, " in told[0]
    assert "Traceback" not in outcomes[0].output


def frozen_after_a_while() -> None:
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_rank_that_was_frozen_is_missed(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its connection is open, but it says nothing: as when a machine is gone."""
    monkeypatch.setattr("cloze.distributed.resilience.watchdog.SILENT_SECONDS", 4.0)
    monkeypatch.setattr("cloze.distributed.resilience.watchdog.GRACE_SECONDS", 1.0)
    before = at_call("cloze.training.trainer", "masked_loss_sum", 4, frozen_after_a_while)
    argv = flags(prepared, tmp_path / "run")
    pids, logs = start_ranks(entering(argv, "ddp", before), 2, tmp_path / "a")
    try:
        wait_for(lambda: Path(f"/proc/{pids[1]}/stat").read_text().split(") ")[1][0] == "T", 120, pids, logs)
        ended = (0, 0)

        def rank_0_has_ended() -> bool:
            nonlocal ended
            ended = os.waitpid(pids[0], os.WNOHANG)
            return ended[0] != 0

        wait_for(rank_0_has_ended, 15, logs=logs)
    finally:
        os.kill(pids[1], signal.SIGKILL)
        os.waitpid(pids[1], 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 75
    told = errors(logs[0].read_text())
    assert f"rank 1 on {socket.gethostname()} said nothing for 4 s in train, step 3" in told[0]
    kept = error_json(tmp_path / "run")
    assert (kept["rank"], kept["phase"], kept["step"]) == (1, "train", 3)
    assert [other["rank"] for other in kept["others"]] == [0]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--async_save"]])
def test_a_save_that_takes_longer_than_the_hang_timeout_is_no_hang(prepared: Path, tmp_path: Path, more: list[str]):
    """One rank's disk is slow, and the other waits for it."""

    def slow_disk() -> None:
        from cloze.checkpoint import safetensors_writer

        plain = safetensors_writer.tensor_bytes

        def tensor_bytes(tensor):
            if os.environ["RANK"] == "1":
                time.sleep(0.3)
            return plain(tensor)

        safetensors_writer.tensor_bytes = tensor_bytes

    argv = flags(prepared, tmp_path / "run", "--hang_timeout", "4", "--max_steps", "2", "--save_steps", "2", *more)
    succeed(cloze_ranks(argv, 2, "ddp", tmp_path / "log", slow_disk))
