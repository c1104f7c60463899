"""Lock a run folder for one training process with a lock file that is safe on NFS.

    with own_run_folder(Path("runs/mine")):     # OwnerError if another start is alive
        ...
        check_owner(Path("runs/mine"))          # before each write: OwnerError if another start has taken over

RUN/.owner names the owner: host, boot, process, start time, job and a random token. It is created by link(2),
which is atomic on NFS, and carries a heartbeat: its modification time, set every BEAT_SECONDS through an open
descriptor, so that a process which has lost the folder cannot refresh its successor's lock.

An owner that has ended without removing its lock is detected
- at once, on the same host (same boot, same pid namespace): no process has its pid and start time, or that process
  has another lock file open, so that this one is a copy; or the host has been restarted since;
- at once, if this start is the same SLURM job with a higher restart count: a requeued job is the successor;
- anywhere else after TIMEOUT_SECONDS without a heartbeat, measured by the observer's own monotonic clock.
The lock of token t is replaced or removed only by the process that holds the claim RUN/.owner.after-t, which is
created by link(2) too: of many starts that find the same dead owner, one takes over. A process that holds a claim and
dies is superseded in the same way, through a claim to its own token.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cloze.distributed.resilience.owner_file import (
    LOCK,
    Owner,
    Sighting,
    check_lock,
    create_lock,
    folder_of,
    has_ended,
    read_owner,
    this_process,
)
from cloze.errors import DiskError, OwnerError
from cloze.utils.atomic_files import disk_errors
from cloze.utils.foreign.paths import real_path
from cloze.utils.terminal.console import is_main, say

BEAT_SECONDS = 10.0
TIMEOUT_SECONDS = 120.0
CLAIM_SECONDS = 10.0  # a live process that holds a claim replaces the lock within this time
_POLL_SECONDS = 0.05
_held: dict[str, RunOwner] = {}


class RunOwner:
    """This process's claim to a run folder. `beat` and `timeout` in seconds."""

    def __init__(self, run_dir: Path, beat: float = BEAT_SECONDS, timeout: float = TIMEOUT_SECONDS):
        self.run_dir, self._beat, self._timeout = run_dir, beat, timeout
        self.me = this_process(secrets.token_hex(8))
        self._lock = run_dir / LOCK
        self._own_file = run_dir / f"{LOCK}.{self.me.token}"
        self._seen: dict[str, tuple[Sighting, float]] = {}
        self._made: list[Path] = []
        self._descriptors: list[int] = []  # of the lock last; open from its creation on, which `is_copy` relies on
        self._ended, self._lost = threading.Event(), False

    def acquire(self) -> None:
        """Create the folder if it does not exist, and own it. Raises OwnerError if another start is alive or the lock
        is no regular file, DiskError if nothing can be written there. Waits up to `timeout` seconds for the heartbeat
        of an owner on another host."""
        try:
            with disk_errors(self.run_dir):
                self._make_folder()
                check_lock(self._lock)
                self._write_own_file()
                try:
                    self._take()
                finally:
                    self._own_file.unlink(missing_ok=True)
                self._remove_leftovers()
        except BaseException:
            self._close()
            raise
        threading.Thread(target=self._keep_beating, name="owner", daemon=True).start()

    def check(self) -> None:
        """Raise OwnerError unless this process still owns the folder; DiskError if that cannot be read."""
        with disk_errors(self._lock):
            found = read_owner(self._lock)
        if found is not None and found.owner.token == self.me.token and not self._lost:
            return
        hint = "nothing more is written; the other start continues from the last checkpoint"
        if not self._lost and (now := folder_of(self._descriptors[-1])):
            by = f"it was moved to {now}"
            hint = "nothing more is written; start again with its new path as --output_dir"
        elif found is not None:
            by = f"it was taken over by {found.owner}"
        else:
            by, hint = f"{LOCK} was removed", "nothing more is written; start again if no other start trains there"
        raise OwnerError(f"this start does not own the run folder any more ({by})", where=self.run_dir, hint=hint)

    def release(self) -> None:
        """Remove the lock if this process still owns the folder, and the folder if acquire made it and it is empty."""
        if os.getpid() != self.me.pid:  # a fork
            return
        self._ended.set()
        claims: list[Path] = []
        with contextlib.suppress(OSError):
            self._write_own_file()
            if self._claim(self.me.token, claims) and self._holds(self.me.token):
                self._lock.unlink()
        with contextlib.suppress(OSError):
            for path in [self._own_file, *claims]:
                path.unlink(missing_ok=True)
        self._close()

    def _make_folder(self) -> None:
        if os.path.lexists(self.run_dir) and not self.run_dir.is_dir():
            what = "is no folder" if self.run_dir.exists() else "is a link to a folder that does not exist"
            raise DiskError(what, where=self.run_dir, hint="remove it, or choose another --output_dir")
        missing = [path for path in [self.run_dir, *self.run_dir.parents] if not path.exists()]
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._made = missing

    def _write_own_file(self) -> None:
        descriptor = os.open(self._own_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o644)
        self._descriptors.append(descriptor)
        with open(descriptor, "w", encoding="utf-8", closefd=False) as file:
            file.write(json.dumps(asdict(self.me), indent=2) + "\n")
            file.flush()
            os.fsync(descriptor)

    def _take(self) -> None:
        """Create the lock, or replace that of an owner that has ended."""
        claims_since: dict[str, float] = {}
        while not create_lock(self._own_file, self._lock, self._descriptors):
            found = read_owner(self._lock)
            if found is None:
                continue
            if not self._is_over(found):
                time.sleep(min(1.0, self._timeout / 20))
            elif self._replace(found.owner.token):
                break
            else:
                holder = read_owner(self._claim_of(found.owner.token))
                begin = claims_since.setdefault(found.owner.token, time.monotonic())
                if holder is not None and time.monotonic() - begin > CLAIM_SECONDS:
                    raise self._refusal(holder.owner)
                time.sleep(_POLL_SECONDS)
        self._descriptors.append(os.open(self._lock, os.O_RDWR | os.O_NOFOLLOW))

    def _is_over(self, found: Sighting) -> bool:
        """Return whether an owner has ended; False if that is not known yet. Raises OwnerError if it is alive."""
        owner = found.owner
        if self.me.succeeds(owner):
            return True
        ended = has_ended(owner, self.me)
        if ended is False and found.is_copy():
            return True
        if ended is None:
            first, since = self._seen.setdefault(owner.token, (found, time.monotonic()))
            if found.beat != first.beat:
                ended = False
            elif time.monotonic() - since >= self._timeout:
                ended = True
            elif found is first:
                say("owner", f"{owner} holds {self._lock}; waiting up to {self._timeout:.0f} s for its heartbeat")
        if ended is False:
            raise self._refusal(owner)
        return ended is True

    def _refusal(self, owner: Owner) -> OwnerError:
        return OwnerError(
            f"another start is training in this folder: {owner}",
            where=self.run_dir,
            hint="wait for it or stop it, or choose another --output_dir",
        )

    def _replace(self, token: str) -> bool:
        """Replace the lock of `token`; whether this process was the one to do it."""
        claims: list[Path] = []
        try:
            if not self._claim(token, claims) or not self._holds(token):
                return False
            if self._claim_of(self.me.token).exists():  # this process was stopped so long that it was superseded
                return False
            os.replace(self._own_file, self._lock)
            return True
        finally:
            for claim in claims:
                claim.unlink(missing_ok=True)

    def _claim(self, token: str, claims: list[Path]) -> bool:
        """Get the right to replace or remove the lock of `token`, also from a process that had it and has ended."""
        path = self._claim_of(token)
        if create_lock(self._own_file, path, self._descriptors):
            claims.append(path)
            return True
        holder = read_owner(path)
        if holder is None or token == self.me.token or holder.owner.token == self.me.token:
            return False
        try:
            is_over = self._is_over(holder)
        except OwnerError:
            return False
        return is_over and self._claim(holder.owner.token, claims)

    def _holds(self, token: str) -> bool:
        found = read_owner(self._lock)
        return found is not None and found.owner.token == token

    def _claim_of(self, token: str) -> Path:
        return self.run_dir / f"{LOCK}.after-{token}"

    def _remove_leftovers(self) -> None:
        """Remove claims to locks that are gone, and files of processes that were killed while they acquired."""
        for path in self.run_dir.glob(f"{LOCK}.*"):
            with contextlib.suppress(OSError):
                found = read_owner(path)
                bygone = path.name.startswith(f"{LOCK}.after-") and path != self._claim_of(self.me.token)
                if bygone or (found is not None and has_ended(found.owner, self.me)):
                    path.unlink(missing_ok=True)

    def _keep_beating(self) -> None:
        while not self._ended.wait(self._beat):
            try:
                if os.fstat(self._descriptors[-1]).st_nlink == 0:
                    self._lost = True
                    return
                os.utime(self._descriptors[-1])
            except OSError as error:
                if error.errno == errno.ESTALE:
                    self._lost = True
                    return

    def _close(self) -> None:
        self._ended.set()
        while self._descriptors:
            os.close(self._descriptors.pop())
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # fails if anything is in it


@contextlib.contextmanager
def own_run_folder(run_dir: Path, beat: float = BEAT_SECONDS, timeout: float = TIMEOUT_SECONDS) -> Iterator[None]:
    """Own a run folder while the block runs; on rank 0 only. Raises as `RunOwner.acquire`."""
    if not is_main():
        yield
        return
    owner, key = RunOwner(run_dir, beat, timeout), str(real_path(run_dir))
    owner.acquire()
    _held[key] = owner
    try:
        yield
    finally:
        del _held[key]
        owner.release()


def check_owner(run_dir: Path) -> None:
    """Raise OwnerError if this process owned the folder and another start has taken it over. No-op in a process that
    never owned it: other ranks, and callers outside of training."""
    owner = _held.get(str(real_path(run_dir)))
    if owner is not None:
        owner.check()


def release_all() -> None:
    """Release every folder that this process owns, before it ends without unwinding."""
    for owner in list(_held.values()):
        owner.release()


def owner_token(run_dir: Path) -> str:
    """Return the token for temporary names in a folder: its owner's if this process owns it, else a random one."""
    owner = _held.get(str(real_path(run_dir)))
    return secrets.token_hex(8) if owner is None else owner.me.token


def is_ours(run_dir: Path) -> bool:
    """Return whether the folder's owner is of this launch (any of its ranks); True without an owner."""
    found = None
    with contextlib.suppress(OSError):
        found = read_owner(run_dir / LOCK)
    return found is None or found.owner.launch == this_process("").launch
