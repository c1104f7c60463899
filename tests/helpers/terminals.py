"""A real terminal (a pty) for a command, and what stands on its screen.

    terminal = Terminal(lambda: main(["train", ...]), columns=80, rows=24)
    terminal.wait_for("loss")
    terminal.press("\x03")                  # Ctrl-C
    code = terminal.wait()
    terminal.screen.rows                    # what a person sees at the end

`Screen` understands what xterm's documentation says of the few sequences that Cloze writes, and fails on any other.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

_SEQUENCE = re.compile(r"\x1b(?:\[(\??)([\d;]*)([A-Za-z])|([78DM]))")


class Screen:
    """Rows of characters, a cursor, a scrolling region; colours are left out."""

    def __init__(self, columns: int, rows: int):
        self.columns, self.height = columns, rows
        self.cells = [[" "] * columns for _ in range(rows)]
        self.row = self.column = 0
        self.top, self.bottom = 0, rows - 1
        self.cursor_shown, self.colours = True, set[str]()
        self.scrolled_off: list[str] = []
        self._saved = 0, 0
        self._rest = ""

    @property
    def rows(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.cells]

    @property
    def text(self) -> str:
        return "\n".join([*self.scrolled_off, *self.rows])

    @property
    def in_order(self) -> bool:
        """Whether the next program finds the terminal as it should be."""
        return self.cursor_shown and (self.top, self.bottom) == (0, self.height - 1) and not self.colours

    def feed(self, text: str) -> None:
        text, self._rest = self._rest + text, ""
        while text:
            if text[0] == "\x1b":
                found = _SEQUENCE.match(text)
                if found is None:
                    assert len(text) < 20, f"not understood: {text[:20]!r}"
                    self._rest = text
                    return
                self._obey(*(part or "" for part in found.groups()))
                text = text[found.end() :]
            else:
                self._put(text[0])
                text = text[1:]

    def _put(self, char: str) -> None:
        if char == "\n":
            self._down()
        elif char == "\r":
            self.column = 0
        elif char != "\x07":
            if self.column == self.columns:
                self.column = 0
                self._down()
            self.cells[self.row][self.column] = char
            self.column += 1

    def _down(self) -> None:
        if self.row == self.bottom:
            gone = self.cells.pop(self.top)
            if self.top == 0:
                self.scrolled_off.append("".join(gone).rstrip())
            self.cells.insert(self.bottom, [" "] * self.columns)
        else:
            self.row = min(self.row + 1, self.height - 1)

    def _obey(self, private: str, numbers: str, letter: str, short: str) -> None:
        values = [int(number or 0) for number in numbers.split(";")]
        match private + (letter or short):
            case "7":
                self._saved = self.row, self.column
            case "8":
                self.row, self.column = self._saved
            case "D" if short:
                self._down()
            case "A":
                self.row = max(0, self.row - (values[0] or 1))
            case "H":
                self.row = min((values[0] or 1), self.height) - 1
                self.column = min((values[1] if len(values) > 1 else 0) or 1, self.columns) - 1
            case "r":
                self.top, self.bottom = 0, self.height - 1
                if numbers:
                    self.top, self.bottom = values[0] - 1, values[1] - 1
                self.row = self.column = 0
            case "K":
                assert values[0] == 2
                self.cells[self.row] = [" "] * self.columns
            case "J":
                assert values[0] == 0
                self.cells[self.row][self.column :] = [" "] * (self.columns - self.column)
                for row in range(self.row + 1, self.height):
                    self.cells[row] = [" "] * self.columns
            case "?h" | "?l":
                assert values == [25]
                self.cursor_shown = letter == "h"
            case "m":
                self.colours = set() if numbers in ("", "0") else self.colours | set(numbers.split(";"))
            case other:
                raise AssertionError(f"not understood: {other} {numbers}")


class Terminal:
    """`function` in a forked process whose input and output are a terminal of this size."""

    def __init__(self, function: Callable[[], None], columns: int = 80, rows: int = 24, **environment: str):
        self.written = ""
        self.screen = Screen(columns, rows)
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            _be_child(function, columns, rows, environment)
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Until this was written; fails where it is not in time."""
        deadline = time.monotonic() + seconds
        while text not in self.written:
            assert self._read(deadline), f"no {text!r} in:\n{self.screen.text}"

    def wait(self, seconds: float = 60.0) -> int:
        """The exit code, when everything that was written is on the screen."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        if time.monotonic() >= deadline:
            os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
        data = b""
        with suppress(OSError):  # EIO: the other side is closed
            data = os.read(self._fd, 65536) if ready else b""
        text = data.decode(errors="replace")
        self.written += text
        self.screen.feed(text)
        return bool(data)


def _be_child(function: Callable[[], None], columns: int, rows: int, environment: dict[str, str]) -> None:
    code = 1
    try:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        for name in ("NO_COLOR", "CLOZE_LOG_FORMAT", "COLUMNS", "LINES"):
            os.environ.pop(name, None)
        os.environ |= {"TERM": "xterm-256color"} | environment
        function()
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
