"""Commands beside a live run: each reads one whole checkpoint and writes nothing that the run owns."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from ranks import Outcome, at_call, cloze_ranks, entering, start_ranks, wait_for

from cloze.checkpoint.format import list_checkpoints
from cloze.checkpoint.lineage import from_mapping, read_record

DERIVED = ("model", "eval.json", "report.html")  # what commands write into the folder of a run


def training(prepared: Path, run: Path, *more: str) -> list[str]:
    flags = ["--logging_steps", "1", "--per_device_train_batch_size", "2", "--ema_decay", "0.5", *more]
    return ["train", *TINY_MODEL, "--dataset_name", str(prepared), "--output_dir", str(run), *flags]


def commands(run: Path, prepared: Path, elsewhere: Path) -> list[list[str]]:
    """Commands that read a run; the first four are those of each user. `elsewhere`: where other models are put."""
    data = ["--data", str(prepared), "--use_cpu"]
    return [
        ["consolidate", str(run)],
        ["evaluate", str(run), *data],
        ["report", str(run)],
        ["push", str(run), "--repo", "user/tiny", "--dry_run", "true"],
        ["consolidate", str(run), "--weights", "ema", "--output", str(elsewhere / "ema")],
        ["consolidate", str(run), "--average", "2", "--output", str(elsewhere / "average")],
        ["compare", str(run), str(elsewhere / "ema"), *data],
        ["fill", str(run), "--text", "A whale is a <mask>."],
    ]


def owned(run: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and content of each file that belongs to the run, apart from the heartbeat of its lock."""
    files = [path for path in run.rglob("*") if path.is_file() and path.relative_to(run).parts[0] not in DERIVED]
    found = {}
    for path in files:
        facts = path.stat()
        time = 0 if path.name == ".owner" else facts.st_mtime_ns
        found[str(path.relative_to(run))] = facts.st_ino, time, path.read_bytes()
    return found


def step_of(path: Path) -> int | None:
    found = from_mapping(json.loads(path.read_text()))
    return None if found is None else found.step


def steps_in(metrics: Path) -> list[int]:
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()]


def end_of(outcome: Outcome) -> str:
    """The last line of a command's output."""
    assert "Traceback" not in outcome.output, outcome.output
    return outcome.output.splitlines()[-1]


@pytest.mark.parametrize("count", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_commands_beside_a_live_run_read_whole_checkpoints_and_leave_its_files_alone(
    prepared: Path, tmp_path: Path, count: int
):
    run, go = tmp_path / "run", tmp_path / "go"
    pause = at_call("cloze.training.trainer", "train_step", 5, lambda: wait_for(go.exists, 300), rank=0)
    argv = training(prepared, run, "--max_steps", "6", "--save_steps", "2")
    (pid,), (log,) = start_ranks(entering(argv, "ddp", pause), 1, tmp_path / "train")
    wait_for(lambda: (run / "checkpoint-4" / "checkpoint.json").exists(), pids=[pid], logs=[log])
    wait_for(lambda: '"step": 4,' in (run / "metrics.jsonl").read_text(), pids=[pid], logs=[log])
    before = owned(run)
    for number, words in enumerate(commands(run, prepared, tmp_path)[:count]):
        outcome = cloze_ranks(words, 1, "single", tmp_path / f"command-{number}")[0]
        assert outcome.code == 0, (words, outcome.output)
    assert owned(run) == before
    assert step_of(run / "eval.json") == 4
    records = [read_record(folder) for folder in (run / "model", tmp_path / "ema", tmp_path / "average")]
    expected = [(4,), (4,), (2, 4)] if count == 8 else [(4,), None, None]
    assert [record and record.steps for record in records] == expected
    go.touch()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, log.read_text()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


@pytest.mark.slow
def test_commands_beside_a_run_that_rotates_each_step_succeed_or_name_the_deleted_checkpoint(
    prepared: Path, tmp_path: Path
):
    run = tmp_path / "run"
    argv = training(prepared, run, "--max_steps", "100000", "--save_steps", "1", "--save_total_limit", "1")
    (pid,), (log,) = start_ranks(entering(argv, "ddp"), 1, tmp_path / "train")
    try:
        wait_for(lambda: bool(list_checkpoints(run)), pids=[pid], logs=[log])
        for number, words in enumerate(commands(run, prepared, tmp_path) * 3):
            if "--average" in words:  # only one checkpoint is kept
                continue
            if words[0] == "compare" and not (tmp_path / "ema").exists():  # its checkpoint was deleted
                continue
            outcome = cloze_ranks(words, 1, "single", tmp_path / f"command-{number}")[0]
            if outcome.code:
                assert outcome.code == 2, (words, outcome.output)
                reasons = ("was deleted while it was read", "is of step", "there is no model here yet")
                assert any(reason in end_of(outcome) for reason in reasons), (words, outcome.output)
    finally:
        os.kill(pid, signal.SIGTERM)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 75, log.read_text()
    steps = steps_in(run / "metrics.jsonl")
    assert steps == list(range(1, len(steps) + 1))
