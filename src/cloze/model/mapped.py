"""Weights in mapped files: a whole model without private memory, until each rank has taken its share.

    with weights_in_files(folder):
        model = AutoModelForMaskedLM.from_config(config)     # or from_pretrained
    partition(model, settings, torch.float32)    # cloze.training.engines.zero3: each file is freed with its parameter

Every parameter gets a file when a module registers it, so that at most one is in memory; transformers draws or loads
the weights into the files, with the same bits as in memory. Code that reads a whole model still works. The operating
system can write out and drop pages of a mapped file (`RssFile` in /proc/self/status, not `RssAnon`). The files have no
names: they disappear with the process.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from cloze.utils.atomic_files import disk_errors
from cloze.utils.foreign.paths import real_path

_IN_MEMORY = {"tmpfs", "ramfs"}
_ATTEMPTS = 100  # each rank removes the folder at most once


@contextlib.contextmanager
def weights_in_files(folder: Path) -> Iterator[None]:
    """Put parameters of modules that this thread makes inside into nameless files of `folder`, created if missing.

    Parameters that are already mapped (fp32 safetensors) stay there. Raises DiskError if the disk is full.
    """
    plain = torch.nn.Module.register_parameter
    thread, asynchronous = threading.get_ident(), os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")

    def register_parameter(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        plain(self, name, param)
        if param is not None and threading.get_ident() == thread:
            move_to_file(param, folder)

    torch.nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # else transformers converts half precision ahead, in memory
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = plain  # type: ignore[method-assign]
        if asynchronous is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = asynchronous


@torch.no_grad()
def move_to_file(parameter: torch.nn.Parameter, folder: Path) -> None:
    """Move a parameter's elements into a file, with the same strides, unless they are in one."""
    old = parameter.data
    if old.device.type != "cpu" or old.numel() == 0 or is_mapped(old):
        return
    extent = 1 + sum((size - 1) * stride for size, stride in zip(old.shape, old.stride(), strict=True))
    storage = _mapped_storage(extent * old.element_size(), folder)
    new = torch.empty(0, dtype=old.dtype).set_(storage, 0, old.shape, old.stride())  # type: ignore[call-overload]
    parameter.data = new.copy_(old)


def zeros_in_file(numel: int, dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """Return zeros [numel] in a nameless file of `folder`. Raises DiskError if the disk is full."""
    storage = _mapped_storage(numel * dtype.itemsize, folder)
    return torch.empty(0, dtype=dtype).set_(storage, 0, (numel,))  # type: ignore[call-overload]


def is_mapped(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's elements are mapped from a file (Linux; elsewhere False)."""
    address = tensor.data_ptr()
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        for line in maps:
            begin, end = line.split(" ", 1)[0].split("-")
            if int(begin, 16) <= address < int(end, 16):
                return line.split(maxsplit=5)[4] != "0"  # the inode
    return False


def _mapped_storage(num_bytes: int, folder: Path) -> torch.UntypedStorage:
    with disk_errors(folder):
        fd, name = _new_file(folder)
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk raises an error here, not a signal at the first write
                os.posix_fallocate(fd, 0, num_bytes)
            return torch.UntypedStorage.from_file(name, shared=True, nbytes=num_bytes)  # type: ignore[return-value]
        finally:
            os.close(fd)
            os.unlink(name)


def _new_file(folder: Path) -> tuple[int, str]:
    """Make a file in a folder, created if missing, also if a finished rank removes it in between."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            folder.mkdir(parents=True, exist_ok=True)
            return tempfile.mkstemp(prefix=".weights-", dir=folder)
    folder.mkdir(parents=True, exist_ok=True)  # something else is wrong: raise it
    return tempfile.mkstemp(prefix=".weights-", dir=folder)


def folder_for_weights(output_dir: Path) -> Path:
    """Return the folder for files of weights: that for temporary files (TMPDIR); the run's if that is in memory."""
    temporary = real_path(tempfile.gettempdir())
    return output_dir / ".weights" if file_system(temporary) in _IN_MEMORY else temporary


def file_system(path: Path) -> str | None:
    """Return the file system of a path (`ext4`, `tmpfs`); None if unknown (not Linux)."""
    found: tuple[int, str] | None = None
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, place, kind = line.split(" ")[:3]
            if path.is_relative_to(place) and (found is None or len(place) >= found[0]):
                found = len(place), kind
    return None if found is None else found[1]
