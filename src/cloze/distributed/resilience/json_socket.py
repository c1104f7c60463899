"""A connection between two ranks with one JSON object per line, for the watch; and errors while ranks join."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from cloze.distributed.rendezvous import hearing_failures, report_failure
from cloze.distributed.resilience.error_records import exit_code_of, is_lost_connection
from cloze.distributed.resilience.run_owner import release_all
from cloze.errors import LostRank, is_common, one_line
from cloze.utils.terminal.console import complain, is_main

LONGEST_LINE = 1 << 20  # bytes


@contextlib.contextmanager
def failure_reported() -> Iterator[None]:
    """Report an error of the block to the ranks that wait for this one to join, unless all ranks have it."""
    try:
        yield
    except Exception as error:
        if not is_common(error):
            report_failure(one_line(error), exit_code_of(error))
        raise


@contextlib.contextmanager
def lost_while_joining(seconds: float) -> Iterator[None]:
    """Report a rank that fails or is lost in one line while the processes join, for at most `seconds`."""
    try:
        with hearing_failures(_leave, seconds):
            yield
    except (RuntimeError, OSError) as error:
        line = " ".join(str(error).split())
        if not is_lost_connection(line):
            raise
        raise LostRank(f"another rank ended while the processes were joining ({line[:200]})", loud=True) from error


def _leave(line: str, exit_code: int) -> None:
    """Exit this process, because its main thread waits inside torch and cannot raise."""
    if is_main():
        complain(f"cloze: error: {line}")
    release_all()
    os._exit(exit_code)


class Link:
    """A connection that carries one JSON object per line."""

    def __init__(self, connection: socket.socket):
        self._socket, self._file = connection, connection.makefile("rb")
        self._lock = threading.Lock()
        self.about: dict[str, Any] = {}
        self.heard = time.monotonic()
        self.gone = False

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), self._lock:
            self._socket.sendall((json.dumps(message) + "\n").encode())

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None at the end or for an invalid message."""
        try:
            line = self._file.readline(LONGEST_LINE)
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) else None
