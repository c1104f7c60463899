"""A limit on the memory of a process that the kernel enforces: a control group of Linux, version 1 or 2; needs root.

    with memory_group("rank0", 1 << 30) as group:
        subprocess.Popen([sys.executable, "-c", group.enter + "import torch ..."])
    group.peak                                                   # bytes, pages of files that could be dropped included

All pages that the process is first to touch count, those of files too, though the kernel may drop those.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


@dataclass
class MemoryGroup:
    """`enter`: Python that puts the process which runs it into the group; `peak`: the most bytes it had at once."""

    folder: Path
    enter: str
    peak: int = 0


@contextlib.contextmanager
def memory_group(name: str, num_bytes: int) -> Iterator[MemoryGroup]:
    """A group for one process, which must have ended when the block does. Skips the test where none can be made."""
    version_1 = (ROOT / "memory" / "memory.limit_in_bytes").exists()
    own = _own_group("memory" if version_1 else "")
    folder = (ROOT / "memory" if version_1 else ROOT) / own.lstrip("/") / f"cloze-{name}"
    try:
        folder.mkdir(exist_ok=True)
        (folder / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(num_bytes))
        for swap in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
            if (folder / swap).exists():
                (folder / swap).write_text(str(num_bytes) if version_1 else "0")
    except OSError as error:
        pytest.skip(f"no limit on memory can be set here: {error}")
    group = MemoryGroup(folder, f"import os; open({str(folder / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n")
    try:
        yield group
        peak = folder / ("memory.max_usage_in_bytes" if version_1 else "memory.peak")
        group.peak = int(peak.read_text()) if peak.exists() else 0
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)


def _own_group(controller: str) -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if names == controller:
            return path
    return "/"
