"""Signs of progress of work that takes long, so that `--hang_timeout` does not take it for a hang.

    beat()                              # in what takes long: after each file, tensor, or some megabytes
    beats(threading.main_thread())      # how many signs a thread has given so far

The watch of a run (`cloze.distributed.resilience.watchdog`) counts those of the main thread, and of other ranks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable

_counts: dict[int, int] = {}


def beat() -> None:
    """Give a sign of progress of this thread."""
    thread = threading.get_ident()
    _counts[thread] = _counts.get(thread, 0) + 1


def beats(thread: threading.Thread) -> int:
    """Return the number of signs that a thread has given."""
    return _counts.get(thread.ident or 0, 0)


def join_progressing(thread: threading.Thread, interval_seconds: float = 0.5) -> None:
    """Wait for a thread to end; its signs of progress are those of the thread that waits."""
    seen = beats(thread)
    while thread.is_alive():
        thread.join(interval_seconds)
        if beats(thread) != seen:
            seen = beats(thread)
            beat()


class Progress:
    """When one of several sources (this rank, other ranks) was last seen to make progress: `when`, monotonic time."""

    def __init__(self) -> None:
        self.when = time.monotonic()
        self._counts: dict[Hashable, int] = {}

    def update(self, source: Hashable, count: int) -> None:
        """Note how many signs a source has given."""
        if self._counts.get(source, 0) != count:
            self._counts[source] = count
            self.when = time.monotonic()

    @property
    def total(self) -> int:
        """Return the signs of all sources."""
        return sum(self._counts.values())
