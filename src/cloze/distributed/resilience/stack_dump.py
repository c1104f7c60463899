"""Write the stacks of a hanging process's threads.

write_stacks(run_dir / "stacks", rank=3, title="rank 3 on host, train, step 120")
waits_for_others()          # whether this process waits for another that hangs
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from pathlib import Path

from cloze.utils.terminal.console import front

STACKS = "stacks"
# Code that waits for other ranks, or for a device in a collective: (part of a file's name, function).
_WAITING = (
    ("torch/distributed/", ""),
    ("deepspeed/comm/", ""),
    ("deepspeed/runtime/zero/", ""),
    ("accelerate/utils/operations", ""),
    ("torch/autograd/graph", "_engine_run_backward"),
    ("cloze/training/prefetch", "read"),
)


def write_stacks(folder: Path, rank: int, title: str) -> None:
    """Write the stacks of all threads into `folder`/rank-N.txt, each line with `console.front`, so that the files can
    be read together. Errors of the disk are ignored."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{rank}.txt"
        path.unlink(missing_ok=True)  # of an earlier start, or a link
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(descriptor, "r+", encoding="utf-8") as file:
            file.write(f"{title}\n")
            file.flush()
            faulthandler.dump_traceback(file)
            if front():
                file.seek(0)
                lines = file.read().splitlines()
                file.seek(0)
                file.write("".join(f"{front()}{line}\n" for line in lines))


def waits_for_others() -> bool:
    """Return whether the main thread waits for other ranks, judging by its stack."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        code = frame.f_code
        if any(part in code.co_filename and name in code.co_name for part, name in _WAITING):
            return True
        frame = frame.f_back
    return False
