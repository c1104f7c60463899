"""Weights in mapped files: a whole model that takes no memory of its own, until each rank has taken its share.

    with weights_in_files(folder):
        model = AutoModelForMaskedLM.from_config(config)     # or from_pretrained
    partition(model, settings, torch.float32)    # cloze.training.engines.zero3: each file goes with its parameter

Every parameter gets a file as soon as a module registers it, so that at most one is in memory; transformers draws or
loads the weights as ever, into the files. They are the same bits as without, for every architecture, and everything
that looks at a whole model goes on to work. Pages of a mapped file are the operating system's to write out and to
drop (`RssFile` in /proc/self/status, not `RssAnon`). The files have no names: whatever ends the process, they go too.
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
    """Parameters of modules that this thread makes inside lie in nameless files of `folder`, which is made if need be.

    Parameters that are mapped from a file already (fp32 safetensors) stay there. Raises DiskError where there is no
    room for one.
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
    """Let a parameter's elements lie in a file, with the same strides, unless they do already."""
    old = parameter.data
    if old.device.type != "cpu" or old.numel() == 0 or is_mapped(old):
        return
    extent = 1 + sum((size - 1) * stride for size, stride in zip(old.shape, old.stride(), strict=True))
    storage = _mapped_storage(extent * old.element_size(), folder)
    new = torch.empty(0, dtype=old.dtype).set_(storage, 0, old.shape, old.stride())  # type: ignore[call-overload]
    parameter.data = new.copy_(old)


def zeros_in_file(numel: int, dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """Zeros [numel] in a nameless file of `folder`. Raises DiskError where there is no room."""
    storage = _mapped_storage(numel * dtype.itemsize, folder)
    return torch.empty(0, dtype=dtype).set_(storage, 0, (numel,))  # type: ignore[call-overload]


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a file is behind a tensor's elements (Linux; elsewhere never)."""
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
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and not a signal when it is written
                os.posix_fallocate(fd, 0, num_bytes)
            return torch.UntypedStorage.from_file(name, shared=True, nbytes=num_bytes)  # type: ignore[return-value]
        finally:
            os.close(fd)
            os.unlink(name)


def _new_file(folder: Path) -> tuple[int, str]:
    """Make a file in a folder, which is made if need be: again if another rank, which has finished, removes it
    between the two."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            folder.mkdir(parents=True, exist_ok=True)
            return tempfile.mkstemp(prefix=".weights-", dir=folder)
    folder.mkdir(parents=True, exist_ok=True)  # something else is wrong: raise it
    return tempfile.mkstemp(prefix=".weights-", dir=folder)


def folder_for_weights(output_dir: Path) -> Path:
    """Where files of weights go: the folder for temporary files (TMPDIR), or where that is in memory, the run's."""
    temporary = real_path(tempfile.gettempdir())
    return output_dir / ".weights" if file_system(temporary) in _IN_MEMORY else temporary


def file_system(path: Path) -> str | None:
    """The kind of file system that a path is on (`ext4`, `tmpfs`); None where that is not known (not Linux)."""
    found: tuple[int, str] | None = None
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, place, kind = line.split(" ")[:3]
            if path.is_relative_to(place) and (found is None or len(place) >= found[0]):
                found = len(place), kind
    return None if found is None else found[1]
