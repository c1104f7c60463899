"""Signals while nothing is under way: during the imports of a command, and after its end.

    leave_on_signals()          # exit code 130 for Ctrl-C, 75 for SIGTERM and SIGUSR1, as later on
    leave_on_signals(code)      # the command is done: exit with its code
    if is_importing(frame):     # in a handler that is about to raise
        signal_again(number)

An exception that a signal raises during an import is taken for a failure of that import: libraries turn it into
another error, leave a half-made module, or pass over it.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_INTERRUPTED, EXIT_TEMPORARY = 128 + signal.SIGINT, 75
_RETRY_SECONDS = 0.05
_sent_again: set[int] = set()


def leave_on_signals(code: int | None = None) -> None:
    """Let each of REQUESTS that is not ignored end this process at once, with `code` if it is given."""

    def leave(number: int, _: Any) -> None:
        if code is None:
            _write_line(number)
        os._exit(exit_code_of_signal(number) if code is None else code)

    for number in REQUESTS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def exit_code_of_signal(number: int) -> int:
    """Return the exit code of a process that one of REQUESTS has ended."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TEMPORARY


def _write_line(number: int) -> None:
    """Write on rank 0 what ended the process. No line before the module is there that knows the rank."""
    processes = sys.modules.get("cloze.utils.environment.processes")
    if getattr(processes, "rank", lambda: 1)() != 0:
        return
    name = "interrupted" if number == signal.SIGINT else f"{signal.Signals(number).name}: stopped before it began"
    try:
        os.write(2, f"cloze: {name}\n".encode())
    except OSError:  # stderr is closed
        return


def is_importing(frame: FrameType | None) -> bool:
    """Return whether code that a function of Cloze, or its caller, imports is running in this frame."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        is_cloze = str(frame.f_globals.get("__name__")).startswith("cloze.")
        if is_cloze and frame.f_code.co_name != "<module>":
            return False
        frame = frame.f_back
    return False


def signal_again(number: int) -> None:
    """Send this process the same signal in a moment."""
    import threading

    def send() -> None:
        _sent_again.add(number)
        os.kill(os.getpid(), number)

    timer = threading.Timer(_RETRY_SECONDS, send)
    timer.daemon = True
    timer.start()


def is_sent_again(number: int) -> bool:
    """Return whether a signal that arrived is one of `signal_again`; to be asked once for each arrival."""
    was_sent = number in _sent_again
    _sent_again.discard(number)
    return was_sent
