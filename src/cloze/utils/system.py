"""What a process runs on, by the names that logs, cards and tables show.

versions_of(["torch", "deepspeed"])     # {"torch": "2.13.0"}: those that are installed
processor()                             # "AMD EPYC 9554 64-Core Processor"
"""

from __future__ import annotations

import contextlib
import platform
import resource
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

SPARE_FILES = 256


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


def set_tf32(on: bool) -> None:
    """Let fp32 matrix products and convolutions on a GPU compute in TF32 or not.

    torch has two interfaces for it (2.9 brought `fp32_precision`), and raises RuntimeError if they are mixed: the one
    that this process has used is used.
    """
    import torch

    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32  # noqa: B018  raises if they are mixed
    except RuntimeError:
        for backend in _precise_backends():
            backend.fp32_precision = "tf32" if on else "ieee"


class Tf32Settings:
    """What this process has set of torch's TF32 switches, by either interface."""

    def __init__(self) -> None:
        import torch

        self._old: dict[Any, bool] = {}
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
            with contextlib.suppress(RuntimeError):  # the other interface was used
                self._old[backend] = backend.allow_tf32
        self._new = [(backend, backend.fp32_precision) for backend in _precise_backends()]

    def restore(self) -> None:
        """Set them again."""
        for backend, on in self._old.items():
            with contextlib.suppress(RuntimeError):
                backend.allow_tf32 = on
        for backend, precision in self._new:
            backend.fp32_precision = precision


def _precise_backends() -> list[Any]:
    """torch's backends of a GPU that have a `fp32_precision`: none before torch 2.9."""
    import torch

    cudnn = torch.backends.cudnn
    found = [torch.backends.cuda.matmul, cudnn, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)]
    return [backend for backend in found if hasattr(backend, "fp32_precision")]


def allow_open_files(count: int) -> None:
    """Ask for `count` files and sockets beside the usual ones, as far as the machine allows (`ulimit -Hn`): many
    machines let a process have 1,024 unless it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
