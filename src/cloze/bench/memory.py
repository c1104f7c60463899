"""How much memory of its own a piece of work takes in this process (Linux).

    with PeakMemory() as peak:
        load_state(training, pieces)
    peak.grown                  # bytes above what was there before, at the highest

Anonymous memory only: pages of mapped files are the operating system's to drop.
"""

from __future__ import annotations

import gc
import re
import threading
from pathlib import Path

INTERVAL_SECONDS = 0.002


def anonymous_memory() -> int:
    """Bytes of this process's memory that no file is behind."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


class PeakMemory:
    """Looks every 2 ms while the block runs."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.grown = 0
        self._before, self._ended = anonymous_memory(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            self.grown = max(self.grown, anonymous_memory() - self._before)
            if self._ended.wait(INTERVAL_SECONDS):
                return
