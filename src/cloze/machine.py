"""What a process runs on, by the names that logs, cards and tables show.

versions_of(["torch", "deepspeed"])     # {"torch": "2.13.0"}: those that are installed
processor()                             # "AMD EPYC 9554 64-Core Processor"
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The version of each package that is installed, in the order given."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def processor() -> str:
    """The CPU's model, or where the system does not tell it, its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
