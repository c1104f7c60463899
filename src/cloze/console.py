"""What a person sees: one line per stage, and a progress bar with an ETA (plain lines where there is no terminal).

say("prepare", "12,000 blocks in prepared/eli5")
with progress("tokenize", total=5000, unit="documents") as advance:
    advance(100, note="1.2 Mtok/s")
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

PLAIN_INTERVAL_SECONDS = 10.0


def is_main() -> bool:
    """Whether this process is the one that talks (rank 0, or the only one)."""
    return os.environ.get("RANK", "0") == "0"


def say(stage: str, line: str) -> None:
    """Print one line about a stage, on rank 0 only."""
    if is_main():
        print(f"{stage:<12} {line}", flush=True)


def warn(line: str) -> None:
    """Print one warning line to stderr, on rank 0 only."""
    if is_main():
        print(f"cloze: warning: {line}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`75` -> `1:15`, `3675` -> `1:01:15`."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def progress(stage: str, total: int | None, unit: str = "", start: int = 0) -> Iterator[Callable[..., None]]:
    """Yield `advance(n=1, note="")`. A rich bar on a terminal; elsewhere a plain line every 10 seconds."""
    if not is_main():
        yield lambda n=1, note="": None
    elif sys.stderr.isatty():
        yield from _bar(stage, total, unit, start)
    else:
        yield from _plain(stage, total, unit, start)


def _bar(stage: str, total: int | None, unit: str, start: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
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
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(stage, total=total, completed=start, note="")
        yield lambda n=1, note="": bar.update(task, advance=n, note=note)


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
        count = f"{done:,}" if total is None else f"{done:,}/{total:,}"
        eta = "" if total is None else f"  ETA {duration((now - begin) / max(1, done - start) * (total - done))}"
        print(
            f"{stage:<12} {count} {unit}  {duration(now - begin)}{eta}  {note}".rstrip(), file=sys.stderr, flush=True
        )

    yield advance
