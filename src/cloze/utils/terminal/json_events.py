"""JSON output (`--log_format json`): one object per line on stdout.

    event("checkpoint", message="runs/x/checkpoint-500")
    # {"event": "checkpoint", "time": "2025-01-31T12:00:00.000+00:00", "message": "runs/x/checkpoint-500"}

Each object has `event` and `time` (UTC), and `rank` if it is not 0. `metrics` has the numbers of metrics.jsonl;
`warning`, `stopped` and `error` report the state (an error: what, where, hint, kind, exit_code); `output` has a line
of other text, such as a table or output of a library; any other name is a stage with its `message`.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from datetime import datetime, timezone
from typing import Any, TextIO

from cloze.utils.environment import processes
from cloze.utils.foreign.json_yaml import dump_json
from cloze.utils.terminal.redact import redacted

_lock = threading.RLock()


def is_json() -> bool:
    """Return whether the output is JSON."""
    return os.environ.get("CLOZE_LOG_FORMAT") == "json"


lost_output: list[OSError] = []  # why something written to stdout or stderr was dropped


def put(stream: TextIO, text: str) -> None:
    """Write to stdout or stderr. What a full disk or a lost file server behind them does not take is dropped and noted
    in `lost_output`, because a log must not end a run. Raises BrokenPipeError if the reader is gone."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):
            raise
        lost_output[:] = [error]


def event(name: str, **fields: Any) -> None:
    """Write one object to stdout in one call; NaN and infinity become null."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    rank = processes.rank()
    about = {"event": name, "time": now, **({"rank": rank} if rank else {})}
    line = redacted(dump_json(about | fields, default=str, ensure_ascii=True))
    stream = sys.stdout.stream if isinstance(sys.stdout, Lines) else sys.stdout
    with _lock:
        put(stream, line + "\n")


class Lines:
    """Replaces stdout: each printed line becomes an `output` event."""

    def __init__(self, stream: TextIO):
        self.stream, self._rest = stream, ""

    def write(self, text: str) -> int:
        """Write complete lines; buffer a partial line."""
        with _lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                event("output", text=line)
        return len(text)

    def flush(self) -> None:
        """No-op: events flush themselves; partial lines are buffered."""

    def close_line(self) -> None:
        """Write an unfinished last line as an event."""
        if self._rest:
            self.write("\n")

    def isatty(self) -> bool:
        """Return False, so that the output is not coloured."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def speak_json() -> None:
    """Write everything that this process prints on stdout as JSON from now on, Python's warnings included."""
    if not isinstance(sys.stdout, Lines):
        sys.stdout = Lines(sys.stdout)  # type: ignore[assignment]
    warnings.showwarning = _show_warning


def end_json() -> None:
    """Write buffered text and restore stdout."""
    if isinstance(sys.stdout, Lines):
        sys.stdout.close_line()
        sys.stdout = sys.stdout.stream


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    event("warning", message=str(message), kind=category.__name__, where=f"{filename}:{lineno}")
