"""Files that are there whole or not at all.

Everything Cloze writes is first written under a temporary name beside its place, flushed to the disk, and renamed.

    with staged_folder("model") as folder:      # model.tmp-<pid> until the block ends without an exception
        write_json(folder / "config.json", {...})
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloze.console import warn
from cloze.errors import ConfigError, DiskError
from cloze.foreign.json_yaml import dump_json

SPARE_FILES = 256
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BAD_PLACE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EEXIST}


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
        sync(Path(root))


def publish(staged: Path, final: Path) -> None:
    """Rename a finished `staged` folder or file to `final`, which must not exist, and make the rename last."""
    os.rename(staged, final)
    sync(final.parent)


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn 'disk full', 'read-only' and 'no permission' into one `DiskError` line naming `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL | _BAD_PLACE | {errno.ENAMETOOLONG}:
            raise
        raise DiskError(
            f"cannot write: {os.strerror(error.errno or 0)}",
            where=path,
            hint="free some space or choose another folder" if error.errno in _FULL else "choose another folder",
        ) from error


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
        problem = DiskError(
            f"cannot be removed: {os.strerror(error.errno or 0)}", where=path, hint="remove it yourself"
        )
        if not quietly:
            raise problem from error
        warn(str(problem))


def check_writable(path: Path | str, hint: str = "choose another --output") -> None:
    """Raise DiskError unless the file or folder `path` could be created or replaced, before time is spent on what will
    be written there.

    Creates and removes a file in the folder that is to hold `path`, or in the nearest parent that exists.
    """
    folder = Path(path).absolute().parent
    while not folder.is_dir() and folder != folder.parent:
        if folder.exists():
            raise DiskError("cannot write: a part of the path is a file", where=path, hint=hint)
        folder = folder.parent
    try:
        descriptor, name = tempfile.mkstemp(prefix=".cloze-", dir=folder)
        os.close(descriptor)
        os.unlink(name)
    except OSError as error:
        raise DiskError(f"cannot write: {os.strerror(error.errno or 0)}", where=path, hint=hint) from None


@contextlib.contextmanager
def staged_folder(final: Path | str) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and is removed when it does not.

    Raises DiskError where the disk is full or read-only; FileExistsError if `final` exists already.
    """
    final = Path(final)
    if final.exists():
        raise FileExistsError(errno.EEXIST, "already exists", str(final))
    staged = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        with disk_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            yield staged
            sync_tree(staged)
            publish(staged, final)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a whole file atomically (UTF-8)."""
    path = Path(path)
    staged = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with disk_errors(path):
            staged.write_text(text, encoding="utf-8")
            sync(staged)
            os.replace(staged, path)
            sync(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` atomically as readable JSON with a final newline. NaN and infinity become null."""
    write_text(path, dump_json(value, indent=2) + "\n")


def sha256(path: Path | str) -> str:
    """The hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def parse_size(text: str, flag: str) -> int:
    """`500MB` -> 500,000,000; also KB, GB, TB and plain bytes. Raises ConfigError naming the flag."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    size = float(match.group(1)) * 1000 ** " KMGT".index(match.group(2).upper() or " ") if match else 0
    if size < 1:
        raise ConfigError(f"cannot read the size {text!r}", where=flag, hint="write 500MB or 5GB")
    return int(size)


def allow_open_files(count: int) -> None:
    """Ask for `count` files and sockets beside the usual ones, as far as the machine allows (`ulimit -Hn`): many
    machines let a process have 1,024 unless it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
