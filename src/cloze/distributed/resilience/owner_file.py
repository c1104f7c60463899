"""Which process holds a run folder, and whether it has ended.

me = this_process(token)
found = read_owner(Path("runs/mine/.owner"))
has_ended(found.owner, me)      # True, False, or None if that cannot be known from here
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cloze.errors import DataError, OwnerError
from cloze.utils.environment import processes
from cloze.utils.foreign.json_yaml import parse_json
from cloze.utils.foreign.paths import printable

LOCK = ".owner"  # hidden: a run folder may be inside a corpus folder
MOST_BYTES = 64 * 2**10
_LOOPBACK = ("", "localhost", "127.0.0.1", "::1")
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK}


@dataclass(frozen=True)
class Owner:
    """A process that owns, or wants to own, a run folder.

    `machine`: /etc/machine-id; `boot`: the kernel's boot id; `namespace`: of its pid; `started`: clock ticks after
    boot; None if the system does not report one of them. `job`: SLURM's, with its cluster; `restart`: how often it was
    requeued; `launch`: equal on all ranks of one launch; `since`: ISO 8601.
    """

    token: str
    host: str = ""
    machine: str | None = None
    boot: str | None = None
    namespace: str | None = None
    pid: int = 0
    started: int | None = None
    job: str | None = None
    restart: int = 0
    launch: str = ""
    since: str = ""

    def succeeds(self, other: Owner) -> bool:
        """Return whether this is the same SLURM job as `other`, requeued since."""
        return self.job is not None and self.job == other.job and self.restart > other.restart

    def __str__(self) -> str:
        if not self.host:
            return "an unknown process"
        job = f", SLURM job {self.job.split('@')[0]}" if self.job else ""
        return printable(f"pid {self.pid} on {self.host}{job}, since {self.since}")


@dataclass(frozen=True)
class Sighting:
    """Contents of a lock file. `beat`: inode and modification time, which each heartbeat changes."""

    owner: Owner
    beat: tuple[int, int]

    def is_copy(self) -> bool:
        """Return whether the owner, a process of this host, has another file open as its lock: the folder is a copy
        of the one it trains in. False if its open files cannot be examined."""
        files = f"/proc/{self.owner.pid}/fd"
        try:
            return self.beat[0] not in {_inode(f"{files}/{number}") for number in os.listdir(files)}
        except OSError:
            return False


def this_process(token: str) -> Owner:
    """Describe the process that calls it."""
    job, cluster = processes.slurm_job(), processes.slurm_cluster()
    return Owner(
        token=token,
        host=socket.gethostname(),
        machine=_first_line("/etc/machine-id"),
        boot=_first_line("/proc/sys/kernel/random/boot_id"),
        namespace=_pid_namespace(),
        pid=os.getpid(),
        started=_start_time(os.getpid()),
        job=f"{job}@{cluster}" if job else None,
        restart=processes.slurm_restart(),
        launch=_launch(),
        since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def has_ended(owner: Owner, me: Owner) -> bool | None:
    """Return whether a process has ended; None if it cannot be known: another host or another pid namespace."""
    if owner.boot == me.boot and owner.namespace == me.namespace and (me.boot is not None or owner.host == me.host):
        return not _is_running(owner.pid, owner.started)
    if me.boot is not None and owner.boot is not None and owner.boot != me.boot:
        return True if owner.host == me.host and owner.machine == me.machine else None  # restarted since
    return None


def check_lock(path: Path) -> None:
    """Raise OwnerError if the lock is a folder, a link or a device, which Cloze never makes. Raises OSError if it
    cannot be examined."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder"}
        what = f"is {kinds.get(stat.S_IFMT(mode), 'not a regular file')}, not a lock that Cloze made"
        raise OwnerError(what, where=path, hint=f"remove {path} if nothing is training in that folder")


def folder_of(descriptor: int) -> str | None:
    """Return the folder of an open lock file; None if the file was removed or replaced, or if that cannot be known."""
    try:
        if os.fstat(descriptor).st_nlink == 0:
            return None
        return printable(os.path.dirname(os.readlink(f"/proc/self/fd/{descriptor}")))
    except FileNotFoundError:  # no /proc
        return "another place"
    except OSError:
        return None


def read_owner(path: Path) -> Sighting | None:
    """Read a lock file or a claim; None if it is missing. The owner is unknown if the content is invalid. Raises
    OSError if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return Sighting(Owner(token="link"), (0, 0))
    try:
        facts = os.fstat(descriptor)
        content = os.read(descriptor, MOST_BYTES) if stat.S_ISREG(facts.st_mode) else b""
    finally:
        os.close(descriptor)
    if facts.st_nlink == 0:  # replaced or removed since
        return None
    beat = (facts.st_ino, facts.st_mtime_ns)
    return Sighting(_parse(content) or Owner(token=f"unknown-{facts.st_ino}"), beat)


def _parse(content: bytes) -> Owner | None:
    with contextlib.suppress(DataError):
        values = parse_json(content, LOCK)
        if _is_token(values.get("token")):
            known = {field.name: str(field.type) for field in fields(Owner)}
            return Owner(**{name: value for name, value in values.items() if _fits(value, known.get(name))})
    return None


def _is_token(value: Any) -> bool:
    return isinstance(value, str) and 8 <= len(value) <= 64 and value.isalnum()


def _fits(value: Any, kind: str | None) -> bool:
    if kind is None:
        return False
    if value is None:
        return "None" in kind
    return isinstance(value, int if kind.startswith("int") else str) and not isinstance(value, bool)


def _is_running(pid: int, started: int | None) -> bool:
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True
        return True
    now = _stat(pid)
    return now is not None and now[0] not in "ZXx" and started in (None, now[1])


def _start_time(pid: int) -> int | None:
    now = _stat(pid)
    return None if now is None else now[1]


def _stat(pid: int) -> tuple[str, int] | None:
    """Return the state and start time of a process, from /proc; None if it has ended."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
        return values[0], int(values[19])
    except (OSError, IndexError, ValueError):
        return None


def _inode(path: str) -> int | None:
    """Return a file's inode number; None if it is gone. The device is left out: a host may have mounted it twice."""
    with contextlib.suppress(OSError):
        return os.stat(path).st_ino
    return None


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _launch() -> str:
    """Return an identity that only the ranks of one launch share."""
    address, *others = processes.launch_identity()
    host = socket.gethostname() if address in _LOOPBACK else ""
    return " ".join([host, address, *others])


def create_lock(own_file: Path, target: Path, descriptors: list[int]) -> bool:
    """Give the file of this process a second name, and return whether it has it; False if that name is taken.

    Without hard links it creates a copy, and appends the descriptor of the copy to `descriptors`.
    """
    try:
        os.link(own_file, target)
        return True
    except FileExistsError:  # over NFS also if the first answer was lost and the call was sent again
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(own_file), os.lstat(target))
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        descriptor = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o644)
    except FileExistsError:
        return False
    descriptors.append(descriptor)
    os.write(descriptor, own_file.read_bytes())
    return True
