"""A connection between two ranks that carries one JSON object per line; what the watch hears and says goes over it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import Any


class Link:
    """A connection that carries one JSON object per line."""

    def __init__(self, connection: socket.socket):
        self._socket, self._file = connection, connection.makefile("r", encoding="utf-8")
        self._lock = threading.Lock()
        self.about: dict[str, Any] = {}
        self.heard = time.monotonic()
        self.gone = False

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), self._lock:
            self._socket.sendall((json.dumps(message) + "\n").encode())

    def receive(self) -> dict[str, Any] | None:
        try:
            line = self._file.readline()
            return json.loads(line) if line.endswith("\n") else None
        except (OSError, ValueError):
            return None
