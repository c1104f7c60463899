"""Lock a folder between processes, if the file system supports locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_HELD_ELSEWHERE = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}
_POLL_SECONDS = 0.2


def try_lock(path: Path) -> int | None:
    """Return a descriptor that holds the lock (close it to release); None if another process holds it.

    Raises OSError if the file system has no locks, or the file cannot be made.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in _HELD_ELSEWHERE:
            return None
        raise
    return handle


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold the lock during the block; `on_wait` is called once if another process holds it.

    Yields False at once if the file system has no locks: then several processes may be in the block.
    """
    handle, is_told = None, False
    try:
        while handle is None:
            try:
                handle = try_lock(path)
            except OSError:
                break
            if handle is None:
                if not is_told:
                    on_wait()
                is_told = True
                time.sleep(_POLL_SECONDS)
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)
