"""DeepSpeed's C++ extensions, compiled at their first use on a machine.

    load_op(AsyncIOBuilder(), "offload to a disk")

torch's builds print nothing. A killed build leaves a lock for which later builds wait forever
(torch.utils.file_baton): here a lock without an owner is removed.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from cloze.errors import ConfigError
from cloze.model.mapped import file_system
from cloze.utils.foreign.paths import real_path
from cloze.utils.terminal.console import say

SECONDS_WITHOUT_A_SIGN = 900.0  # a single file of CUDA code takes minutes
_SEEN_BY_ONE_MACHINE = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "f2fs"}
_LOADS_BEFORE = {"async_io": ("pin_memory",)}  # DeepSpeed 0.19: ops that its `load` loads first


def load_op(builder: Any, what_for: str) -> Any:
    """Return the op of `builder`, compiled if necessary. Raises ConfigError if it cannot be compiled, or another build
    holds the lock without progress."""
    from deepspeed.git_version_info import installed_ops

    root = _build_root()
    for name in (builder.name, *_LOADS_BEFORE.get(builder.name, ())):
        wait_for_lock(root / name / "lock")
    if not installed_ops.get(builder.name) and not (root / builder.name / f"{builder.name}.so").exists():
        say("compile", f"DeepSpeed's {builder.name} for {what_for}, once on this machine; some minutes")
    try:
        return builder.load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        line = " ".join(str(error).split())[:300]
        what = f"DeepSpeed's {builder.name} cannot be compiled ({line})"
        raise ConfigError(what, where=str(root / builder.name), hint="see `ds_report`") from None


def wait_for_lock(lock: Path, seconds: float = SECONDS_WITHOUT_A_SIGN) -> None:
    """Wait for a build in progress. A lock left by a killed build is removed if only this machine can see it. Raises
    ConfigError if nothing was written to the lock's folder for `seconds`."""
    warned = False
    while lock.exists():
        if file_system(real_path(lock)) in _SEEN_BY_ONE_MACHINE and not is_held(lock):
            time.sleep(0.2)  # torch creates and opens the lock in one call; reading /proc takes longer
            if not is_held(lock):
                lock.unlink(missing_ok=True)
                return
        if not warned:
            say("compile", f"waiting for another process that builds {lock.parent.name}")
            warned = True
        if time.time() - _last_written(lock.parent) > seconds:
            raise ConfigError(
                f"a build of DeepSpeed's {lock.parent.name} has its lock, and has written nothing for {seconds:.0f} s",
                where=str(lock),
                hint="remove that file, if no build is running on another machine",
            )
        time.sleep(0.5)


def is_held(lock: Path) -> bool:
    """Return whether a process of this machine has the file open, as torch's builds do (Linux). True for a lock of
    another user, whose processes cannot be inspected."""
    try:
        if lock.stat().st_uid != os.getuid():
            return True
    except OSError:
        return False
    name = str(real_path(lock))
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(fd) == name:
                return True
    return not Path("/proc/self/fd").exists()


def _last_written(folder: Path) -> float:
    times = [folder.stat().st_mtime]
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times)


def _build_root() -> Path:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory("async_io", verbose=False)).parent
