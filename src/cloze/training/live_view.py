"""The display of training: a live view in the last rows of a terminal; plain lines elsewhere.

    with training_view(run, start.step) as view:
        view.advance()                # one more step
        view.log(line)                # a line of metrics.jsonl

A thread draws the view twice a second from numbers that the loop has anyway: training does not wait for it, and it
reads nothing from a device. Other lines scroll above it (see `cloze.utils.terminal.screen`).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cloze.checkpoint.run_folder import read_metrics
from cloze.training.run import Run
from cloze.training.run_schedule import Plan
from cloze.utils.foreign.lenient_read import is_number
from cloze.utils.foreign.paths import visible
from cloze.utils.memory import host_memory
from cloze.utils.terminal.console import duration, is_live, is_main, progress, showing
from cloze.utils.terminal.screen import Screen

SECONDS_BETWEEN_DRAWINGS = 0.5
SMOOTHING = 0.9  # weight of the previous smoothed loss
_CELL, _WIDE_CELL, _BAR = 19, 26, 40  # columns: minimum width of a cell for its longest text; maximum of the bar
_GIB = 2**30


class Smoothed:
    """An exponential moving average with bias correction (Kingma and Ba, 2015, section 3; as in TensorBoard)."""

    def __init__(self, stays: float = SMOOTHING):
        self._stays, self._sum, self._weight = stays, 0.0, 0.0

    def add(self, value: float | None) -> None:
        """Add a value. None, of a line whose steps were all skipped, is ignored."""
        if value is not None:
            self._sum = self._stays * self._sum + (1 - self._stays) * value
            self._weight = self._stays * self._weight + 1 - self._stays

    @property
    def value(self) -> float | None:
        """Return the average; None before the first value."""
        return self._sum / self._weight if self._weight else None


def next_due(plan: Plan, strategy: str, every: int | None, done: int) -> int | None:
    """Return the first step after `done` at which an action with this `strategy` is due; None if no such step
    follows."""
    if strategy == "no" or done >= plan.total_steps:
        return None
    if strategy == "steps":
        step = (done // every + 1) * every if every else plan.total_steps + 1
        return step if step <= plan.total_steps else None
    low, high, epoch = done, plan.total_steps, int(plan.epoch(done))  # epochs only grow: bisect
    if int(plan.epoch(high)) == epoch:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if int(plan.epoch(middle)) == epoch else (low, middle)
    return high


class Lines:
    """Progress as plain lines without a terminal (see `cloze.utils.terminal.console`)."""

    def __init__(self, advance: Callable[..., None]):
        self.advance = advance

    def log(self, line: dict[str, Any]) -> None:
        """Show a line of metrics."""
        loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
        self.advance(0, note=f"loss {loss}  {line['tokens_per_second']:,.0f} tokens/s")


class View:
    """The view on a terminal. The loop updates it, a thread draws it."""

    def __init__(self, run: Run, first_step: int, screen: Screen):
        self._run, self._first, self._screen = run, first_step, screen
        self._done, self._begin, self._line = first_step, time.monotonic(), dict[str, Any]()
        self._part: tuple[str, int, int | None, str] | None = None
        self._saved: tuple[int | None, float] = None, 0.0
        self._smoothed = Smoothed()
        for line in read_metrics(run.output_dir):
            self._smoothed.add(line["loss"] if is_number(line.get("loss")) else None)
        device = run.engine.accelerator.device
        self._gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._draw_until_the_end, name="view", daemon=True)

    def advance(self, n: int = 1) -> None:
        """Count `n` more steps."""
        self._done += n

    def log(self, line: dict[str, Any]) -> None:
        """Show a line of metrics."""
        self._smoothed.add(line["loss"])
        self._line = line

    def part(self, stage: str, total: int | None, unit: str, start: int) -> Callable[..., None]:
        """Show the progress of an evaluation; see `cloze.utils.terminal.console.progress`."""
        done = start

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal done
            done += n
            self._part = None if done == total else (stage, done, total, unit)

        return advance

    def begin(self) -> None:
        """Start drawing."""
        render([], 1)  # does its imports in the main thread
        self._thread.start()

    def end(self) -> None:
        """Stop drawing and restore the terminal."""
        self._ended.set()
        self._thread.join(timeout=2.0)
        self._screen.close()

    def _draw_until_the_end(self) -> None:
        while True:
            self._screen.draw(self.rows(self._screen.width()))
            if self._ended.wait(SECONDS_BETWEEN_DRAWINGS):
                return

    def rows(self, width: int) -> list[str]:
        """Return the view in rows of at most `width` columns, with colours if the terminal supports them."""
        columns, size = columns_for(width)
        return render([self._head(width), *grid(self._cells(size), columns, size)], width)

    def _head(self, width: int) -> list[tuple[str, str]]:
        done, total, now = self._done, self._run.plan.total_steps, time.monotonic()
        phase, _ = self._run.watch.doing
        part = self._part
        if phase == "evaluate" and part is not None:
            phase = f"{part[0]} {part[1]:,}" + (f"/{part[2]:,}" if part[2] else "")
        elapsed = now - self._begin
        eta = "-" if done == self._first else duration(elapsed / (done - self._first) * (total - done))
        left = f"{phase:<8} "
        right = f" {done:,}/{total:,} {done / total:4.0%}  ETA {eta}"
        if width >= len(left) + len(right) + len(duration(elapsed)) + 22:
            right += f"  after {duration(elapsed)}"
        room = max(0, min(_BAR, width - len(left) - len(right) - 1))
        full = int(room * done / total)
        return [(left, "bold"), ("━" * full, "green"), ("─" * (room - full), "dim"), (right, "")]

    def _cells(self, size: int) -> list[tuple[str, str]]:
        """Return (label, value) pairs for cells of `size` columns, in reading order."""
        line, run = self._line, self._run
        waited = line.get("data_wait")
        used, host = host_memory()
        gpu = () if self._gpu is None else (("GPU", f"{line.get('memory_gib', 0.0):.1f}/{self._gpu / _GIB:.0f} GiB"),)
        config = run.config
        every = config.eval_steps or config.logging_steps
        evaluation = next_due(run.plan, config.eval_strategy, every, self._done)
        mfu = line.get("mfu")
        return [
            ("loss", _number(line.get("loss"), ".4f")),
            (f"smoothed {SMOOTHING}", _number(self._smoothed.value, ".4f")),
            ("lr", _number(line.get("learning_rate"), ".3g")),
            ("grad norm", _number(line.get("grad_norm"), ".3f")),
            ("tokens/s", _number(line.get("tokens_per_second"), ",.0f")),
            ("MFU", "-" if mfu is None else f"{mfu:.1%}"),
            ("data wait", "-" if waited is None else f"{waited:.1%}"),
            ("epoch", _number(line.get("epoch"), ".3f")),
            ("saved", self._last_checkpoint(size >= _WIDE_CELL)),
            ("next eval", "-" if evaluation is None else f"{evaluation:,}"),
            *gpu,
            ("host", f"{used / _GIB:.1f}/{host / _GIB:.0f} GiB"),
        ]

    def _last_checkpoint(self, with_age: bool) -> str:
        """Return `500 2:03 ago`; only the step of a checkpoint saved before this start."""
        if self._run.saved is None:
            return "-"
        step, now = self._run.saved[0], time.monotonic()
        if self._saved[0] != step:
            self._saved = step, 0.0 if step == self._first else now
        return f"{step:,}" + (f" {duration(now - self._saved[1])} ago" if self._saved[1] and with_age else "")


@contextlib.contextmanager
def training_view(run: Run, first_step: int) -> Iterator[View | Lines]:
    """Yield a View on rank 0 of a terminal, else Lines; end it however the block ends."""
    if not (is_main() and is_live()):
        with progress("train", total=run.plan.total_steps, unit="steps", start=first_step) as advance:
            yield Lines(advance)
        return
    view = View(run, first_step, Screen(sys.stderr.fileno()))
    view.begin()
    try:
        with showing(view.part):
            yield view
    finally:
        view.end()


def columns_for(width: int) -> tuple[int, int]:
    """Return the number of cells side by side in `width` columns, and the columns of each."""
    columns = max(1, min(3, (width + 2) // (_CELL + 2)))
    return columns, max(0, min(34, (width + 2) // columns - 2))


def grid(cells: Sequence[tuple[str, str]], columns: int, size: int) -> list[list[tuple[str, str]]]:
    """Return cells of (label, value) in rows; a row is a list of (text, style)."""
    rows = []
    for at in range(0, len(cells), columns):
        pieces: list[tuple[str, str]] = []
        for label, value in cells[at : at + columns]:
            pieces += [(f"{label} ", "dim"), (f"{value:>{max(0, size - len(label) - 1)}}", "bold"), ("  ", "")]
        rows.append(pieces[:-1])
    return rows


def render(rows: Sequence[Sequence[tuple[str, str]]], width: int) -> list[str]:
    """Return lists of (text, style) as text with the colours of this terminal, cut at `width`."""
    from rich.console import Console
    from rich.text import Text

    global _console
    if _console is None:
        # NO_COLOR removes colours but keeps bold and dim.
        _console = Console(file=open(os.devnull, "w"), force_terminal=True, legacy_windows=False)  # noqa: SIM115
    texts = []
    for row in rows:
        text = Text.assemble(*((visible(piece), style) for piece, style in row))
        text.truncate(width)
        texts.append(text)
    _console.width = width
    with _console.capture() as taken:
        _console.print(Text("\n").join(texts), end="", no_wrap=True, overflow="crop")
    return taken.get().splitlines()


_console: Any = None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
