"""Reserve the last rows of a terminal for a view that is redrawn.

    screen = Screen(2)
    screen.draw(["step 1,234", "loss 2.3"])     # rows of text, coloured or not, no longer than the terminal is wide
    screen.close()

The rows above become the terminal's scrolling region (DECSTBM, as in apt): output of other ranks or of C libraries
scrolls there and is never overwritten. Each drawing is one write, which saves, hides and restores the cursor, so that
nothing flickers and the cursor is never left hidden.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Iterator, Sequence

LEAST_SCROLLING_ROWS = 3
_SAVE, _BACK, _HIDE, _SHOW = "\x1b7", "\x1b8", "\x1b[?25l", "\x1b[?25h"
_WHOLE_REGION, _CLEAR_BELOW, _CLEAR_LINE, _PLAIN = "\x1b[r", "\x1b[J", "\x1b[2K", "\x1b[0m"
_open: list[Screen] = []


class Screen:
    """The last rows of the terminal at file descriptor `fd`; safe to draw from any thread."""

    def __init__(self, fd: int):
        self._fd, self._lock = fd, threading.Lock()
        self._shape: tuple[int, int, int] | None = None  # columns, rows, rows of ours
        self._closed = False
        _open.append(self)

    def width(self) -> int:
        """Return the current number of columns of the terminal."""
        return os.get_terminal_size(self._fd).columns

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines in the last rows; of too many for the terminal's height, the first ones."""
        with self._lock, contextlib.suppress(OSError):  # the terminal may be gone: training continues
            if self._closed:
                return
            columns, rows = os.get_terminal_size(self._fd)
            lines = lines[: max(0, rows - LEAST_SCROLLING_ROWS)]
            begin = ""
            if self._shape != (columns, rows, len(lines)):
                begin = self._reserve(rows, len(lines))
                self._shape = (columns, rows, len(lines))
            top = rows - len(lines) + 1
            drawn = "".join(f"\x1b[{top + at};1H{_CLEAR_LINE}{line}{_PLAIN}" for at, line in enumerate(lines))
            self._write(f"{begin}{_SAVE}{_HIDE}{drawn}{_BACK}{_SHOW}")

    def close(self) -> None:
        """Clear the rows and release them; show the cursor at the end of the text above."""
        with self.handed_back():
            self._closed = True
        with contextlib.suppress(ValueError):
            _open.remove(self)

    @contextlib.contextmanager
    def handed_back(self) -> Iterator[None]:
        """Restore the terminal within the block and draw nothing; the next drawing reserves the rows again."""
        locked = self._lock.acquire(timeout=1.0)  # a drawing thread may wait forever for a stopped terminal (Ctrl-S)
        try:
            if locked and not self._closed and self._shape is not None:
                with contextlib.suppress(OSError):
                    self._write(f"{self._give_back()}{_PLAIN}{_SHOW}")
                self._shape = None
            yield
        finally:
            if locked:
                self._lock.release()

    def _reserve(self, rows: int, count: int) -> str:
        """Reserve `count` rows at the end, and let the others scroll alone."""
        before = "" if self._shape is None else self._give_back()
        room = "\x1bD" * count + (f"\x1b[{count}A" if count else "")  # down, scrolling at the end; and up again
        return f"{before}{room}{_SAVE}\x1b[1;{rows - count}r{_BACK}"

    def _give_back(self) -> str:
        """Return the sequence that clears the rows below the cursor, which are never text of others."""
        return f"{_SAVE}{_WHOLE_REGION}{_BACK}{_CLEAR_BELOW}"

    def _write(self, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(self._fd, data) :]


@contextlib.contextmanager
def all_handed_back() -> Iterator[None]:
    """Restore every terminal within the block, for the shell that is shown while this process is suspended
    (Ctrl-Z)."""
    with contextlib.ExitStack() as stack:
        for screen in list(_open):
            stack.enter_context(screen.handed_back())
        yield


def put_in_order(fd: int) -> None:
    """Undo a killed process's terminal settings: a scrolling region, a hidden cursor."""
    if os.isatty(fd):
        with contextlib.suppress(OSError):
            os.write(fd, f"{_SAVE}{_WHOLE_REGION}{_BACK}{_SHOW}".encode())


def restore() -> None:
    """Restore every terminal; called before a process ends abruptly."""
    for screen in list(_open):
        screen.close()


atexit.register(restore)
