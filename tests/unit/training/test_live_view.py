"""The live view of training: it fits, it costs little, and whatever else is written on the terminal stays there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from terminals import Terminal

from cloze.data.batches.layout import Layout
from cloze.distributed.resilience.report_error import leave_code
from cloze.training import live_view
from cloze.training.live_view import Smoothed, View, next_due
from cloze.training.run_schedule import Plan
from cloze.utils.terminal.screen import Screen

LINE = {
    "loss": 12.3456, "learning_rate": 0.000123456, "grad_norm": 1234.5678, "tokens_per_second": 12345678.9,
    "mfu": 0.4567, "data_wait": 0.0123, "epoch": 123.456, "memory_gib": 71.23,
}  # fmt: skip
LABELS = ["loss", "smoothed 0.9", "lr", "grad norm", "tokens/s", "MFU", "data wait", "ETA", "saved", "next eval"]
LABELS += ["GPU", "host"]
VALUES = ["12.3456", "0.000123", "1234.568", "12,345,679", "45.7%", "1.2%", "1,000,000", "1,002,000", "71.2/80"]
PLAN = Plan(Layout(4, 1, 0, 2), num_blocks=1000, block_size=32, total_samples=8 * 1234567, total_steps=1234567)


@pytest.fixture
def view(tmp_path: Path) -> View:
    """A view of a long run on a GPU, in its middle."""
    config = SimpleNamespace(eval_strategy="steps", eval_steps=1000, logging_steps=10)
    engine = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")))
    run = SimpleNamespace(
        config=config, plan=PLAN, engine=engine, output_dir=tmp_path, saved=(1000000, False),
        watch=SimpleNamespace(doing=("train", 5)),
    )  # fmt: skip
    view = View(run, 1000, SimpleNamespace())  # type: ignore[arg-type]
    view._gpu = 80 * 2**30
    view.advance(1000000)
    view.log(LINE)
    return view


def plain(rows: list[str]) -> list[str]:
    return [re.sub(r"\x1b\[[\d;]*m", "", row) for row in rows]


@pytest.mark.parametrize("width", [40, 41, 60, 79, 80, 100, 120, 200])
def test_every_field_is_whole_and_no_row_is_wider_than_the_terminal(view: View, width: int):
    rows = plain(view.rows(width))
    assert max(len(row) for row in rows) <= width
    for label in LABELS:
        assert any(label in row for row in rows), label
    for value in VALUES:
        assert any(value in row for row in rows), value
    assert len(rows) <= (7 if width < 79 else 5)


def test_without_colours_there_are_none(view: View, monkeypatch: pytest.MonkeyPatch):
    def colours() -> set[str]:
        monkeypatch.setattr(live_view, "_console", None)
        codes = re.findall(r"\x1b\[([\d;]*)m", "".join(view.rows(80)))
        return {one for code in codes for one in code.split(";")} - {"", "0", "1", "2"}

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colours() == {"32"}
    monkeypatch.setenv("NO_COLOR", "1")
    assert colours() == set()


def test_a_drawing_takes_at_most_ten_milliseconds_of_a_core(view: View):
    view.rows(100)
    begin = time.thread_time()
    for _ in range(20):
        view.rows(100)
    assert (time.thread_time() - begin) / 20 < 0.010  # 1.3 ms were measured, twice a second


def test_an_evaluation_shows_how_far_it_is_until_it_is_done(view: View):
    view._run.watch.doing = ("evaluate", 5)  # type: ignore[misc]
    advance = view.part("evaluate", 40, "batches", 0)
    advance(12)
    assert plain(view.rows(100))[0].startswith("evaluate 12/40 ")
    advance(28)
    assert plain(view.rows(100))[0].startswith("evaluate ━")


def test_the_smoothed_loss_is_the_mean_of_a_constant_from_the_first_value_on():
    smoothed = Smoothed(0.9)
    assert smoothed.value is None
    for _ in range(3):
        smoothed.add(5.0)
        assert smoothed.value == pytest.approx(5.0)
    smoothed.add(None)
    smoothed.add(15.0)
    weights = [0.1 * 0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    assert smoothed.value == pytest.approx(
        sum(w * v for w, v in zip(weights, [5, 5, 5, 15], strict=True)) / sum(weights)
    )


@pytest.mark.parametrize(("strategy", "every"), [("no", None), ("steps", 7), ("steps", None), ("epoch", None)])
def test_the_next_evaluation_is_the_first_step_at_which_it_is_due(strategy: str, every: int | None):
    plan = Plan(Layout(4, 1, 0, 2), num_blocks=83, block_size=32, total_samples=8 * 60, total_steps=60)
    for done in range(61):
        due = [step for step in range(done + 1, 61) if plan.is_due(strategy, every, step)]
        assert next_due(plan, strategy, every, done) == (due[0] if due else None), done


def draw_while_others_write(lines: int) -> None:
    """A view of two rows is drawn again and again while a process that knows nothing of it writes."""
    screen = Screen(2)
    screen.draw(["first row", "second row"])
    writer = f"import os\nfor i in range({lines}): os.write(2, f'line {{i}}\\n'.encode())"
    other = subprocess.Popen([sys.executable, "-S", "-c", writer])
    while other.poll() is None:
        screen.draw(["first row", "second row"])
    print("drawn", flush=True)
    os.read(0, 1)
    leave_code(0)
    os._exit(0)


def test_lines_of_other_processes_scroll_above_the_view_and_stay():
    terminal = Terminal(lambda: draw_while_others_write(200), columns=40, rows=10)
    terminal.wait_for("drawn")
    assert terminal.screen.rows[-2:] == ["first row", "second row"]
    terminal.press("\n")
    assert terminal.wait() == 0
    written = re.findall(r"line \d+", terminal.screen.text)
    assert written == [f"line {number}" for number in range(200)]
    assert "row" not in terminal.screen.text
    assert terminal.screen.in_order


def draw_in_two_sizes() -> None:
    screen = Screen(2)
    print("above", flush=True)
    screen.draw(["row 1", "row 2", "row 3"])
    print("go", flush=True)
    os.read(0, 1)
    screen.draw(["row a", "row b"])
    print("below", flush=True)
    screen.close()


def test_when_the_terminal_changes_its_size_the_view_follows():
    terminal = Terminal(draw_in_two_sizes, columns=40, rows=12)
    terminal.wait_for("go")
    assert terminal.screen.rows[-3:] == ["row 1", "row 2", "row 3"]
    terminal.resize(40, 10)
    terminal.press("\n")
    assert terminal.wait() == 0
    assert [row for row in terminal.screen.rows if row][:2] == ["above", "go"]
    assert "row 1" not in terminal.screen.text
    assert terminal.screen.in_order
