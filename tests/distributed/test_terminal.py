"""What `cloze train` shows on a real terminal, and says to a machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from corpus import TINY_MODEL_NO_DROPOUT
from ranks import cloze_ranks, succeed, warm_up
from terminals import Terminal

from cloze.cli import main

FIELDS = ("loss", "smoothed 0.9", "lr", "tokens/s", "MFU", "data wait", "ETA", "saved", "next eval", "host")


def argv_of(prepared: Path, folder: Path, *more: str) -> list[str]:
    argv = ["train", *TINY_MODEL_NO_DROPOUT, "--dataset_name", str(prepared), "--output_dir", str(folder)]
    return [*argv, "--learning_rate", "1e-3", "--logging_steps", "2", *more]


def on_terminal(prepared: Path, folder: Path, *more: str, break_it: Callable[[], None] | None = None) -> Terminal:
    warm_up()

    def enter() -> None:
        if break_it is not None:
            break_it()
        main(argv_of(prepared, folder, *more))

    return Terminal(enter, columns=80, rows=24)


def test_a_terminal_shows_training_and_is_in_order_after_ctrl_c_and_at_the_end(prepared: Path, tmp_path: Path):
    more = ["--eval_strategy", "steps", "--eval_steps", "4", "--save_steps", "4"]
    terminal = on_terminal(prepared, tmp_path / "long", "--max_steps", "100000", *more)
    terminal.wait_for("checkpoint-4")
    terminal.wait_for("saved")
    shown = "\n".join(terminal.screen.rows)
    for field in FIELDS:
        assert field in shown, shown
    assert not terminal.screen.in_order  # its last rows are the view's
    terminal.press("\x03")
    assert terminal.wait() == 130
    assert terminal.screen.in_order
    assert "cloze: interrupted: stopped after step" in terminal.screen.text.replace("\n", "")
    assert "tokens/s" not in terminal.screen.text

    terminal = on_terminal(prepared, tmp_path / "short", "--max_steps", "6", *more)
    assert terminal.wait() == 0
    assert terminal.screen.in_order
    lines = [line for line in terminal.screen.text.splitlines() if line]
    for stage in ("world", "model", "data", "evaluate", "checkpoint", "train", "next"):
        assert any(line.startswith(f"{stage} ") for line in lines), stage


def raise_at_step_5() -> None:
    from cloze.training import trainer

    plain = trainer.train_step

    def broken(run, batch):
        if batch.global_step == 5:
            raise RuntimeError("broken for the test")
        return plain(run, batch)

    trainer.train_step = broken


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "an exception", "Ctrl-C twice"])
def test_a_terminal_is_in_order_after(prepared: Path, tmp_path: Path, how: str):
    break_it = raise_at_step_5 if how == "an exception" else None
    terminal = on_terminal(prepared, tmp_path / "run", "--max_steps", "100000", "--save_steps", "4", break_it=break_it)
    terminal.wait_for("smoothed")
    if how != "an exception":
        terminal.wait_for("checkpoint-4")
    if how == "SIGTERM":
        terminal.kill(signal.SIGTERM)
    elif how == "Ctrl-C twice":
        terminal.kill(signal.SIGINT)
        terminal.press("\x03")
    code = terminal.wait()
    assert code == {"SIGTERM": 75, "an exception": 1}.get(how, 130)
    assert terminal.screen.in_order
    if how == "an exception":
        assert "RuntimeError: broken for the test" in terminal.screen.text


def as_job_of_a_shell(job: Callable[[], None]) -> None:
    """What a shell does with a job that Ctrl-Z stops, and that a line typed at its prompt (`fg`) lets go on."""
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        try:
            job()
        except SystemExit as leaving:
            os._exit(leaving.code)
        os._exit(0)
    _, status = os.waitpid(child, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.tcsetpgrp(0, os.getpgrp())
    os.write(1, b"job stopped ")
    os.read(0, 10)
    os.tcsetpgrp(0, child)
    os.killpg(child, signal.SIGCONT)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.slow
def test_ctrl_z_hands_the_terminal_to_the_shell_and_fg_draws_on(prepared: Path, tmp_path: Path):
    warm_up()
    argv = argv_of(prepared, tmp_path / "run", "--max_steps", "100000", "--save_steps", "4")
    terminal = Terminal(lambda: as_job_of_a_shell(lambda: main(argv)), columns=80, rows=24)
    terminal.wait_for("checkpoint-4")
    terminal.wait_for("smoothed")
    terminal.press("\x1a")
    terminal.wait_for("job stopped ")
    assert terminal.screen.in_order
    assert "tokens/s" not in terminal.screen.text
    terminal.written = ""
    terminal.press("fg\n")
    terminal.wait_for("smoothed")
    terminal.press("\x03")
    assert terminal.wait() == 130
    assert terminal.screen.in_order


@pytest.mark.slow
def test_the_launcher_puts_a_terminal_in_order_that_a_killed_rank_has_left(prepared: Path, tmp_path: Path):
    words = [
        sys.executable,
        "-m",
        "cloze.tools.launch.launcher",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--cpu",
    ]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "cloze"]
    argv = argv_of(prepared, tmp_path / "run", "--max_steps", "100000", "--save_steps", "4")
    terminal = Terminal(lambda: sys.exit(subprocess.run([*words, *argv]).returncode), columns=80, rows=24)
    terminal.wait_for("smoothed")
    assert not terminal.screen.in_order
    *_, rank = psutil.Process(terminal.pid).children(recursive=True)  # shell, launcher, rank
    rank.kill()
    assert terminal.wait() == 75
    assert terminal.screen.in_order


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"CLOZE_LOG_FORMAT": "plain"}])
def test_a_terminal_that_cannot_be_drawn_on_gets_lines(prepared: Path, tmp_path: Path, environment: dict[str, str]):
    warm_up()
    argv = argv_of(prepared, tmp_path / "run", "--max_steps", "6")
    terminal = Terminal(lambda: main(argv), **environment)
    assert terminal.wait() == 0
    assert "\x1b" not in terminal.written
    assert "the run is in" in terminal.screen.text


def test_a_machine_reads_json_and_nothing_else_on_stdout(prepared: Path, tmp_path: Path):
    argv = argv_of(prepared, tmp_path / "run", "--max_steps", "4", "--log_format", "json")
    outcomes = cloze_ranks(argv, 2, "zero2", tmp_path / "log")
    succeed(outcomes)
    # ranks print stdout and stderr into one file here; what libraries log on stderr is no JSON
    events = [json.loads(line) for line in outcomes[0].output.splitlines() if line.startswith("{")]
    assert all(event["time"].endswith("+00:00") for event in events)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [event for event in events if event["event"] == "metrics"]
    assert [{k: v for k, v in event.items() if k not in ("event", "time")} for event in told] == metrics
    end = next(event for event in events if event["event"] == "train")
    assert end["result"] == str(tmp_path / "run")
    assert [line for line in outcomes[0].output.splitlines() if line.startswith(("world ", "model ", "train "))] == []
