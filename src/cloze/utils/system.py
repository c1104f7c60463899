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
    """Return the version of each installed package, in the given order."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def processor() -> str:
    """Return the CPU's model, or its architecture if the system does not report the model."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def set_tf32(on: bool) -> None:
    """Enable or disable TF32 for fp32 matrix products and convolutions on a GPU.

    torch has two interfaces for it (2.9 added `fp32_precision`) and raises RuntimeError if they are mixed, so the one
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
    """This process's TF32 settings, from either interface of torch."""

    def __init__(self) -> None:
        import torch

        self._old: dict[Any, bool] = {}
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
            with contextlib.suppress(RuntimeError):  # the other interface was used
                self._old[backend] = backend.allow_tf32
        self._new = [(backend, backend.fp32_precision) for backend in _precise_backends()]

    def restore(self) -> None:
        """Restore the settings."""
        for backend, on in self._old.items():
            with contextlib.suppress(RuntimeError):
                backend.allow_tf32 = on
        for backend, precision in self._new:
            backend.fp32_precision = precision


def _precise_backends() -> list[Any]:
    """Return torch's GPU backends with a `fp32_precision`: none before torch 2.9."""
    import torch

    cudnn = torch.backends.cudnn
    found = [torch.backends.cuda.matmul, cudnn, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)]
    return [backend for backend in found if hasattr(backend, "fp32_precision")]


def allow_open_files(count: int) -> None:
    """Raise the limit of open files and sockets by `count`, as far as `ulimit -Hn` allows; often 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
