"""Where the processes of a run meet: what is checked before they try to, and who they are once they have.

with joining():                        # a port that is taken is one line
    accelerator = Accelerator(...)
authenticate_ranks(timeout_seconds)    # before the first message
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import torch

from cloze.collectives import gather
from cloze.console import warn
from cloze.environment import processes
from cloze.errors import LaunchError
from cloze.secret import authenticate, check_secret

ANSWER_SECONDS = 120.0  # all ranks have joined by then, so that an answer takes milliseconds


@contextlib.contextmanager
def joining() -> Iterator[None]:
    """Check where the processes meet, and turn a port that is taken into one line. Raises LaunchError."""
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
    """Raise LaunchError for an address of rank 0 that this machine does not know."""
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

    Raises LaunchError if one does not. Without a secret a run on several hosts goes on with a warning: its messages
    are data, never code, but a stranger who reaches its port can take part.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    secret = check_secret(processes.secret())
    known = authenticate(store, rank, world_size, secret, min(timeout_seconds, ANSWER_SECONDS))
    if not known and len(set(gather(socket.gethostname()))) > 1:
        warn(
            f"several hosts without {processes.SECRET}: whoever reaches {':'.join(map(str, processes.master()))} can "
            "take part; set the same on all of them, as launch/multi_node and slurm/submit do (see SECURITY.md)"
        )
