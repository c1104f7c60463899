"""Measure the memory that a piece of work allocates in this process (Linux).

    with PeakMemory() as peak:
        load_state(training, pieces)
    peak.grown                  # the highest increase, in bytes

Only anonymous memory counts: the operating system can drop pages of mapped files.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import threading
from pathlib import Path

from cloze.utils.environment import processes

INTERVAL_SECONDS = 0.002


def anonymous_memory() -> int:
    """Return this process's anonymous memory in bytes."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def free_memory() -> int:
    """Return the bytes that this process may still allocate: an equal share, among the ranks on this host, of the
    memory that the machine or container has left."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    left = [int(found.group(1)) * 1024] if found else []
    with contextlib.suppress(OSError, ValueError):  # "max" where the container has no limit
        cgroup = Path("/sys/fs/cgroup")
        left.append(int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text()))
    return max(0, min(left, default=0)) // (processes.local_world_size() or 1)


def host_memory() -> tuple[int, int]:
    """Return the bytes in use on this machine, or in the container that limits this process, and their limit."""
    text = Path("/proc/meminfo").read_text()
    total, free = (
        int(found.group(1)) * 1024 if (found := re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)) else 0
        for name in ("MemTotal", "MemAvailable")
    )
    with contextlib.suppress(OSError, ValueError):  # "max" where the container has no limit
        cgroup = Path("/sys/fs/cgroup")
        limit = int((cgroup / "memory.max").read_text())
        if limit < total:
            return int((cgroup / "memory.current").read_text()), limit
    return total - free, total


def give_back() -> None:
    """Return freed memory, which glibc keeps, to the operating system, so that later growth is measurable."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # musl and macOS have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Samples the memory every 2 ms within the block."""

    def __enter__(self) -> PeakMemory:
        give_back()
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
