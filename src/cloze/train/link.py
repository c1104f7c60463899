"""A connection between two ranks that carries one JSON object per line; what the watch hears and says goes over it.
And what it looks like when the ranks do not come to have one."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from cloze.errors import LostRank
from cloze.failures import is_lost_connection

LONGEST_LINE = 1 << 20  # bytes


@contextlib.contextmanager
def lost_while_joining() -> Iterator[None]:
    """While the processes find each other nobody can say who is missing: one line instead of a library's error."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        line = " ".join(str(error).split())
        if not is_lost_connection(line):
            raise
        raise LostRank(f"another rank ended while the processes were joining ({line[:200]})", loud=True) from error


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
        """Return the next message, or None at the end, or for what is not one."""
        try:
            line = self._file.readline(LONGEST_LINE)
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) else None
