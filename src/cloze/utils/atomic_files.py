"""Files that are there whole or not at all.

Everything Cloze writes is first written under a temporary name beside its place, flushed to the disk, and renamed.

    with staged_folder("model") as folder:      # model.tmp-<token> until the block ends without an exception
        write_json(folder / "config.json", {...})
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloze.errors import ConfigError, DiskError
from cloze.utils.foreign.json_yaml import dump_json
from cloze.utils.foreign.paths import temporary_name, write_new
from cloze.utils.heartbeat import beat
from cloze.utils.terminal.console import warn

# What to do about an error of the operating system while a file is written: the one table. Those that are in none of
# its rows are disk errors too, with the last hint.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SERVER = (
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    errno.EREMOTEIO,
    errno.ECOMM,
    errno.EPROTO,
    errno.ESHUTDOWN,
    errno.ENOLCK,
    errno.EBUSY,
    errno.EAGAIN,
    errno.ENODEV,
    errno.ENXIO,
    errno.EIO,
)
_HINTS = {
    **dict.fromkeys(_FULL, "free some space or choose another folder"),
    **dict.fromkeys(_SERVER, "look at the disk or its file server, or choose another folder"),
}
_OTHER_HINT = "choose another folder"
_PROBE_BYTES = 2**14
_reported: set[str] = set()  # files that `auxiliary_write` has reported as not writable


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """`sync` every file and folder below and including `folder`."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root) / name)
            beat()
        sync(Path(root))


def publish(staged: Path, final: Path) -> None:
    """Rename a finished `staged` folder or file to `final`, which must not exist, and make the rename last."""
    os.rename(staged, final)
    sync(final.parent)


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn an error of the operating system (full, read-only, a lost file server, ...) into one `DiskError` line.

    Passed through: what libraries raise as an OSError without a number, and broken connections, which are no disk's.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError | ChildProcessError):
            raise
        hint = _HINTS.get(error.errno, _OTHER_HINT)
        raise DiskError(f"cannot write: {os.strerror(error.errno)}", where=path, hint=hint) from error


@contextlib.contextmanager
def auxiliary_write(path: Path | str) -> Iterator[None]:
    """Report a DiskError of the block as a warning, once until a write succeeds: for files that training can do
    without for a while (metrics, status, sessions)."""
    name = str(path)
    try:
        yield
    except DiskError as error:
        if name not in _reported:
            warn(f"{error}; training does not depend on it")
        _reported.add(name)
    else:
        _reported.discard(name)


def append_text(path: Path | str, text: str, good_size: int | None = None) -> int:
    """Append `text` as a whole or not at all, and return the file's new size. `good_size`: what earlier appends have
    written; anything beyond it is the rest of one that failed, and is cut off. Raises DiskError, also if `path` is a
    link."""
    data = memoryview(text.encode("utf-8"))
    with disk_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if good_size is not None and size > good_size:
                os.ftruncate(descriptor, good_size)
                size = good_size
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)


def remove_tree(path: Path | str, quietly: bool = False) -> None:
    """Remove a file, a folder with what is in it, or a symbolic link (not what it points to), if it exists.

    Raises DiskError if something cannot be removed; `quietly`: warns instead, to clean up after another error or where
    what is left is harmless.
    """
    path = Path(path)
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)
    except FileNotFoundError:  # another process removes it too
        if path.exists():
            remove_tree(path, quietly)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG):  # no path: nothing can be there
            return
        problem = DiskError(
            f"cannot be removed: {os.strerror(error.errno or 0)}", where=path, hint="remove it yourself"
        )
        if not quietly:
            raise problem from error
        warn(str(problem))


def check_writable(path: Path | str, hint: str = "choose another --output") -> None:
    """Raise DiskError unless the file or folder `path` could be created or replaced, before time is spent on what will
    be written there.

    Writes and removes a small file in the folder that is to hold `path`, or in the nearest parent that exists: on a
    full disk an empty file can still be created.
    """
    folder = Path(path).absolute().parent
    while not folder.is_dir() and folder != folder.parent:
        if folder.exists():
            raise DiskError("cannot write: a part of the path is a file", where=path, hint=hint)
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(prefix=".cloze-", dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
    except OSError as error:
        raise DiskError(f"cannot write: {os.strerror(error.errno or 0)}", where=path, hint=hint) from None


@contextlib.contextmanager
def staged_folder(final: Path | str) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `final` if the block succeeds and is removed otherwise.

    Raises DiskError if the disk is full or read-only; FileExistsError if `final` exists already.
    """
    final = Path(final)
    if final.exists():
        raise FileExistsError(errno.EEXIST, "already exists", str(final))
    staged = temporary_name(final)
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
    try:
        with disk_errors(final):
            yield staged
            sync_tree(staged)
            publish(staged, final)
    finally:
        remove_tree(staged, quietly=True)


@contextlib.contextmanager
def replaced_folder(final: Path | str) -> Iterator[Path]:
    """Yield a temporary folder, which replaces `final`, if that exists, if the block succeeds.

    If `final` is a symbolic link to a folder, as to a larger disk, that folder is replaced, and the link stays. Raises
    DiskError if the disk is full or read-only, or the link leads nowhere.
    """
    link, final = Path(final), Path(final)
    if link.is_symlink():
        final = Path(os.path.realpath(link))
        if not final.exists():
            hint = "mount that disk, or remove the link"
            raise DiskError(f"is a link to {final}, which does not exist", where=link, hint=hint)
    check_writable(final)
    name = secrets.token_hex(8)
    finished, aside = (final.with_name(f"{final.name}.{kind}-{name}") for kind in ("new", "replaced"))
    try:
        with staged_folder(finished) as staged:
            yield staged
        with disk_errors(final):
            while not _take_place(finished, final, aside):
                remove_tree(aside, quietly=True)
    finally:
        remove_tree(finished, quietly=True)
        if final.exists():
            remove_tree(aside, quietly=True)
        elif aside.exists():
            aside.rename(final)


def _take_place(finished: Path, final: Path, aside: Path) -> bool:
    """Rename `finished` to `final`, which is moved aside if it exists; whether no other process was quicker."""
    with contextlib.suppress(FileNotFoundError):
        final.rename(aside)
    try:
        publish(finished, final)
        return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False


def write_text(path: Path | str, text: str) -> None:
    """Write a whole file atomically (UTF-8)."""
    path = Path(path)
    staged = temporary_name(path)
    with disk_errors(path):
        write_new(staged, text)
    try:
        with disk_errors(path):
            sync(staged)
            os.replace(staged, path)
            sync(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` atomically as readable JSON with a final newline. NaN and infinity become null."""
    write_text(path, dump_json(value, indent=2) + "\n")


def sha256(path: Path | str) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            beat()
    return digest.hexdigest()


def parse_size(text: str, flag: str) -> int:
    """Parse `500MB` as 500,000,000; also KB, GB, TB and plain bytes. Raises ConfigError naming the flag."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    size = float(match.group(1)) * 1000 ** " KMGT".index(match.group(2).upper() or " ") if match else 0
    if size < 1:
        raise ConfigError(f"cannot read the size {text!r}", where=flag, hint="write 500MB or 5GB")
    return int(size)
