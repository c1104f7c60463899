"""Join the processes of a run: checks before they connect, and authentication afterwards.

    with joining():                        # a port in use is reported in one line
        accelerator = Accelerator(...)
    authenticate_ranks(timeout_seconds)    # before the first message

A rank that fails before it joins reports this to the waiting ranks, because not every launcher ends them.

    report_failure(line, exit_code)    # in the rank that fails
    with hearing_failures(act): ...    # in the others, while they wait
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch

from cloze.distributed.collectives import gather
from cloze.distributed.secret import authenticate, check_secret, sign, signed, without_secret
from cloze.errors import DataError, LaunchError
from cloze.utils.environment import processes
from cloze.utils.foreign.json_yaml import parse_json
from cloze.utils.foreign.paths import printable
from cloze.utils.terminal.console import warn

ANSWER_SECONDS = 120.0  # all ranks have joined by then, so an answer takes milliseconds
REPORT_SECONDS = 30.0  # how long a failed rank tries to reach the others
_LOOK_SECONDS = 0.5


@contextlib.contextmanager
def joining() -> Iterator[None]:
    """Check the address of rank 0, and report a port in use in one line. Raises LaunchError."""
    address, port = processes.master()
    if processes.world_size() > 1:
        check_secret(processes.secret())
        check_address(address)
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not any(word in str(error) for word in ("EADDRINUSE", "in use")):
            raise
        raise LaunchError(
            f"port {port} of this machine is taken",
            where=f"{processes.MASTER_PORT}={port}",
            hint="another run has it, or another user; choose a free one (--main_process_port, --port)",
        ) from None


def check_address(address: str) -> None:
    """Raise LaunchError if this machine cannot resolve the address of rank 0."""
    try:
        socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"this machine does not know the name ({getattr(error, 'strerror', None) or error})",
            where=f"{processes.MASTER_ADDR}={address[:200]}",
            hint="put it into DNS or /etc/hosts, or give the first machine's IP address (--main_process_ip, --hosts)",
        ) from None


def authenticate_ranks(timeout_seconds: float) -> None:
    """Let all ranks prove that they belong to this run; every rank calls it, before any message is exchanged.

    Raises LaunchError if one does not. Without a secret, a run on several hosts continues after a warning: its
    messages are data, never code, but any process that reaches its port can take part.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    secret = check_secret(processes.secret())
    known = authenticate(store, rank, world_size, secret, min(timeout_seconds, ANSWER_SECONDS))
    if not known and len(set(gather(socket.gethostname()))) > 1:
        warn(without_secret(":".join(map(str, processes.master()))))


def report_failure(line: str, exit_code: int) -> None:
    """Report this rank's failure to the waiting ranks for at most REPORT_SECONDS. Returns at once: a thread reports,
    and the process ends after it."""
    if processes.world_size() == 1 or not processes.is_launched():
        return
    content = {"rank": processes.rank(), "host": socket.gethostname(), "line": line, "exit_code": exit_code}
    message = sign(_secret(), json.dumps(content).encode())
    serves = processes.rank() == 0 and not processes.launcher_listens()

    def report() -> None:
        with contextlib.suppress(RuntimeError, OSError):
            store = _store(REPORT_SECONDS, serves)
            store.set(_failure_key(), message)
            store.set(f"{_failure_key()}/{processes.rank()}", b"")
            if serves:  # until all others have read it or failed too
                store.wait([f"{_failure_key()}/{rank}" for rank in range(processes.world_size())])

    threading.Thread(target=report, name="report failure").start()


@contextlib.contextmanager
def hearing_failures(act: Callable[[str, int], None], seconds: float) -> Iterator[None]:
    """Call `act(line, exit_code)` in a thread if another rank reports a failure, for at most `seconds`, while the
    block waits for the ranks."""
    ended = threading.Event()

    def listen() -> None:
        with contextlib.suppress(RuntimeError, OSError):
            store = _store(seconds, False)
            while not ended.is_set() and not store.check([_failure_key()]):
                ended.wait(_LOOK_SECONDS)
            failure = None if ended.is_set() else _read_failure(store.get(_failure_key()))
            if failure is not None:
                store.set(f"{_failure_key()}/{processes.rank()}", b"")
                act(*failure)

    if processes.world_size() > 1 and processes.is_launched():
        threading.Thread(target=listen, name="hear failures", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _read_failure(message: bytes) -> tuple[str, int] | None:
    """Return the line and the exit code of a report; None if it is not from a rank of this run."""
    content = signed(_secret(), message)
    with contextlib.suppress(DataError):
        said = parse_json(content or b"", "report of a failed rank")
        line, code = said.get("line"), said.get("exit_code")
        if isinstance(line, str) and isinstance(code, int) and 0 < code < 256:
            return f"rank {printable(str(said.get('rank')))} on {printable(str(said.get('host')))}: {line}", code
    return None


def _secret() -> bytes | None:
    secret = processes.secret()
    return None if secret is None else secret.encode()


def _failure_key() -> str:
    return "/".join(["cloze/failed", *processes.launch_identity()])


def _store(seconds: float, serves: bool) -> Any:
    """Connect to the ranks' store, or with `serves` provide it. Raises RuntimeError after `seconds`."""
    address, port = processes.master()
    limit = timedelta(seconds=seconds)
    return torch.distributed.TCPStore(address, port, None, serves, limit, wait_for_workers=False)
