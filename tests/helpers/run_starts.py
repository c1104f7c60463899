"""Processes that acquire a run folder, and locks of owners elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

from cloze.distributed.resilience.owner_file import LOCK, this_process
from cloze.distributed.resilience.run_owner import check_owner, own_run_folder
from cloze.errors import OwnerError


class Start:
    """A process that acquires a folder and holds it until it is told to end. Exit code 0: it owned it; 2: refused; 3:
    it lost it."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None, go: int | None = None):
        self._stdin, hold = os.pipe()
        told, self._stdout = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(hold)
            os._exit(self._run(folder, environment or {}, go))
        os.close(self._stdin)
        os.close(self._stdout)
        self._hold, self._told = hold, told

    def _run(self, folder: Path, environment: dict[str, str], go: int | None) -> int:
        os.environ |= environment
        if go is not None:
            os.read(go, 1)
        try:
            with own_run_folder(folder):
                os.write(self._stdout, b"owned")
                os.read(self._stdin, 1)
                check_owner(folder)
                (folder / f"written-{os.getpid()}").touch()
        except OwnerError as error:
            os.write(self._stdout, str(error).encode())
            return 3 if "any more" in str(error) else 2
        return 0

    def said(self) -> str:
        return os.read(self._told, 4096).decode()

    def end(self) -> int:
        with contextlib.suppress(BrokenPipeError):  # refused
            os.write(self._hold, b"x")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def refuse_link(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def elsewhere(folder: Path, **facts: object) -> Path:
    """Make a lock that a process on another host holds."""
    owner = replace(this_process("f" * 16), host="far", boot="another", machine="another", **facts)  # type: ignore[arg-type]
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(owner)))
    return folder / LOCK
