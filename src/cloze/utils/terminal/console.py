"""Terminal output: one line per stage, and a progress bar with an ETA (plain lines without a terminal).

    say("prepare", "12,000 blocks in prepared/eli5")
    say("train", "1,200 steps; the run is in runs/x", result="runs/x")     # shown even with `quiet`
    with progress("tokenize", total=5000, unit="documents") as advance:
        advance(100, note="1.2 Mtok/s")

Only rank 0 writes, except for errors: each line from another rank begins with `[rank 3 @ host]`. --log_format sets the
form (or CLOZE_LOG_FORMAT; see FORMATS). `json` writes each line as an object (`cloze.utils.terminal.json_events`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from cloze.utils.environment import processes
from cloze.utils.foreign.json_yaml import on_left_out
from cloze.utils.foreign.paths import visible, visible_in_colour
from cloze.utils.terminal.json_events import event, is_json, put
from cloze.utils.terminal.library_output import own_stream
from cloze.utils.terminal.redact import redacted

if TYPE_CHECKING:
    from rich.table import Table

PLAIN_INTERVAL_SECONDS = 10.0
FORMAT_VARIABLE = "CLOZE_LOG_FORMAT"
FORMATS = {
    "auto": "a live view on a terminal, lines elsewhere",
    "plain": "lines",
    "verbose": "lines, and the output and warnings of libraries",
    "quiet": "warnings, errors, and the path of the result",
    "json": "one JSON object a line on stdout, errors too",
}
_answers: list[bool] = []
# Who shows progress during a live display: (stage, total, unit, start) -> advance.
_shown: list[Callable[[str, int | None, str, int], Callable[..., None]]] = []


def log_format() -> str:
    """Return the log format, one of FORMATS."""
    return os.environ.get(FORMAT_VARIABLE, "auto")


def split_log_format(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the words of a command line without --log_format, and its last value, None if absent."""
    words, chosen, rest = [], None, list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--log_format":
            chosen = rest.pop(0) if rest else ""
        elif word.startswith("--log_format="):
            chosen = word.partition("=")[2]
        else:
            words.append(word)
    return words, chosen


def answer(yes: bool) -> None:
    """Treat later output as the result if `yes`: show it even with `quiet`."""
    _answers[:] = [True] * yes


def is_quiet() -> bool:
    """Return whether only warnings, errors and results are shown."""
    return log_format() == "quiet"


def is_live() -> bool:
    """Return whether live displays may be drawn on the terminal."""
    return log_format() == "auto" and sys.stderr.isatty() and os.environ.get("TERM") not in (None, "dumb", "unknown")


def own_rank() -> int:
    """Return this process's rank as set by its launcher; 0 without one."""
    return processes.rank()


def is_main() -> bool:
    """Return whether this process writes output: rank 0, or the only process."""
    return processes.rank() == 0


def front() -> str:
    """Return the prefix of this process's errors and warnings: `[rank 3 @ host] `; empty for rank 0 on a single
    host."""
    world = processes.world_size()
    if is_main() and world == (processes.local_world_size() or world):
        return ""
    return f"[rank {own_rank()} @ {socket.gethostname()}] "


def complain(text: str) -> None:
    """Write lines to stderr on any rank, each with `front`, in one call, so that lines of ranks that share a terminal
    do not mix. Characters that cannot be encoded are escaped."""
    text = visible(redacted(text.encode("utf-8", "backslashreplace").decode("utf-8")))
    put(sys.stderr, "".join(f"{front()}{line}\n" for line in text.splitlines()))


def silence_other_ranks() -> None:
    """Silence libraries on ranks other than 0, except for errors.

    Call it before torch is imported, because torch's C++ part reads its level once.
    """
    if is_main():
        return
    silence_libraries()
    threading.excepthook = _complain_of_thread


def silence_libraries() -> None:
    """Silence messages, warnings and progress bars of libraries, but not their errors. Call it in Cloze's own process
    before libraries are imported; `python -W` keeps warnings, and --log_format verbose everything."""
    if (split_log_format(sys.argv[1:])[1] or log_format()) == "verbose":
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.disable(logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if not is_live():  # a download shows a bar on a terminal
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "WANDB_SILENT"):
            os.environ.setdefault(name, "true")


def _complain_of_thread(what: threading.ExceptHookArgs) -> None:
    if what.exc_type is not SystemExit:
        complain("".join(traceback.format_exception(what.exc_type, what.exc_value, what.exc_traceback)))


def say(stage: str, line: str, result: object = None) -> None:
    """Print one line about a stage, on rank 0 only. `result`: where the command's result is, which replaces the line
    with `quiet`; True if the line itself is the result."""
    if not is_main():
        return
    if is_json():
        event(stage, message=line, **({} if result in (None, True) else {"result": str(result)}))
    elif not is_quiet() or _answers:
        show(f"{stage:<12} {line}")
    elif result is not None:
        show(f"{stage:<12} {line if result is True else result}")


def show(text: str, stream: TextIO | None = None) -> None:
    """Print text on stdout, or on another stream, without secrets and with terminal control characters escaped,
    because names and texts of files may contain them."""
    put(stream or own_stream(), visible(redacted(text)) + "\n")


def show_coloured(text: str) -> None:
    """Print text on stdout as `show` does, but with its ANSI colours. Foreign parts must be `visible`."""
    put(own_stream(), visible_in_colour(redacted(text)) + "\n")


def show_table(table: Table, width: int | None = None) -> None:
    """Print a rich table on stdout, at most `width` columns wide (None: the terminal's width). Cells are plain text,
    not rich markup."""
    from rich.console import Console

    drawn = Console(width=width, markup=False, emoji=False, highlight=False)
    with drawn.capture() as taken:
        drawn.print(table)
    show_coloured(taken.get().removesuffix("\n"))


def warn(line: str, on_any_rank: bool = False) -> None:
    """Print one warning line to stderr, on rank 0 only unless it concerns this rank (`on_any_rank`)."""
    if not (is_main() or on_any_rank):
        return
    if is_json():
        event("warning", message=line)
    else:
        complain(f"cloze: warning: {line}")


on_left_out.append(warn)


def tell_end(line: str, exit_code: int) -> None:
    """Print on rank 0 why the command ends early without an error: it was asked to."""
    if is_main() and is_json():
        event("stopped", message=line, exit_code=exit_code)
    elif is_main():
        show(f"{front()}cloze: {line}", sys.stderr)


def duration(seconds: float) -> str:
    """Return a duration as text: 75 (seconds) -> `1:15`, 3675 -> `1:01:15`."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def progress(stage: str, total: int | None, unit: str = "", start: int = 0) -> Iterator[Callable[..., None]]:
    """Yield `advance(n=1, note="")`. A rich bar on a terminal; elsewhere a plain line every 10 seconds."""
    if not is_main() or is_quiet():
        yield lambda n=1, note="": None
    elif _shown:
        yield _shown[-1](stage, total, unit, start)
    elif is_live():
        yield from _bar(stage, total, unit, start)
    else:
        yield from _plain(stage, total, unit, start)


@contextlib.contextmanager
def showing(part: Callable[[str, int | None, str, int], Callable[..., None]]) -> Iterator[None]:
    """Show progress with `part` within the block, because a live display uses the terminal."""
    _shown.append(part)
    try:
        yield
    finally:
        _shown.remove(part)


def _bar(stage: str, total: int | None, unit: str, start: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    # rich would send output that is redirected by `> log` to the terminal
    lines = sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=lines) as bar:
        task = bar.add_task(stage, total=total, completed=start, note="")
        yield lambda n=1, note="": bar.update(task, advance=n, note=escape(visible(note)))


def _plain(stage: str, total: int | None, unit: str, start: int) -> Iterator[Callable[..., None]]:
    begin = last = time.monotonic()
    done = start

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last < PLAIN_INTERVAL_SECONDS:
            return
        last = now
        seconds = now - begin
        left = None if total is None else seconds / max(1, done - start) * (total - done)
        if is_json():
            event("progress", stage=stage, done=done, total=total, unit=unit, seconds=seconds, eta_seconds=left,
                  note=note)  # fmt: skip
            return
        count = f"{done:,}" if total is None else f"{done:,}/{total:,}"
        eta = "" if left is None else f"  ETA {duration(left)}"
        show(f"{stage:<12} {count} {unit}  {duration(seconds)}{eta}  {note}".rstrip(), sys.stderr)

    yield advance
