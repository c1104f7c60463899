"""Open foreign files safely: plain names, regular files, no links.

    plain_name("model-00001-of-00002.safetensors")      # the name; DataError for ../x, a/b, NUL, control characters
    with open_regular(folder / name) as file: ...       # DataError for a link, a pipe, a device, a folder
    with open_regular(path, typed=True) as file: ...    # the path that the user typed may be a link

The cache of the Hugging Face Hub is made of links (`snapshots/REVISION/config.json` to `blobs/HASH`): a link is
followed if it is in a snapshot and its target in `blobs` of the same repository.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from pathlib import Path, PurePosixPath
from typing import IO, cast

from cloze.errors import ClozeError, DataError

MAX_NAME = 255
MAX_PARTS = 16
MAX_TEXT_BYTES = 1 << 24  # of a card or a script
_COLOURS = re.compile(r"(\x1b\[[0-9;]*m)")
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_COPY_IT = "replace the link with its target file"


def real_path(path: Path | str) -> Path:
    """Return the absolute path without links. A loop of links, for which Path.resolve raises, stays as it is."""
    return Path(os.path.realpath(path))


def plain_name(name: object, *, where: object = None, error: type[ClozeError] = DataError) -> str:
    """Return `name` if it is the name of a file in a folder. Raises `error` for anything else: a path, `..`, an empty
    name, one with a control character, or a value that is not text."""
    if not is_plain_name(name):
        raise error(
            f"names a file outside its folder or none: {printable(str(name))}", where=where, hint="do not use it"
        )
    return cast(str, name)


def is_plain_name(name: object) -> bool:
    """Return whether `name` is the name of a file in a folder."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and len(os.fsencode(name.encode("utf-8", "replace"))) <= MAX_NAME
        and not any(c in "/\\" or not c.isprintable() for c in name)
    )


def plain_path(name: object, *, where: object = None, error: type[ClozeError] = DataError) -> str:
    """Return `name` if it is a relative path of plain names, as `model/config.json`. Raises `error` if not."""
    parts = name.split("/") if isinstance(name, str) else []
    if not 1 <= len(parts) <= MAX_PARTS or not all(map(is_plain_name, parts)):
        raise error(
            f"names a file outside its folder or none: {printable(str(name))}", where=where, hint="do not use it"
        )
    return cast(str, name)


def open_regular(
    path: Path | str,
    *,
    folder: Path | str | None = None,
    typed: bool = False,
    error: type[ClozeError] = DataError,
) -> IO[bytes]:
    """Open a regular file for reading. Raises `error` if it is missing, a link, or not a regular file.

    `folder`: no part of `path` below this folder may be a link; by default the last part may not. `typed`: the user
    gave this path, so that links are followed, and a pipe of the shell (`<(...)`) is read.
    """
    file = check_regular(path, folder=folder, typed=typed, error=error)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if typed else os.O_NOFOLLOW)
    try:
        handle = os.open(file, flags)
    except (OSError, ValueError) as problem:
        raise _cannot_be_read(path, problem, error) from None
    if not _is_readable(os.fstat(handle).st_mode, path, typed):
        os.close(handle)
        raise error("not a regular file", where=printable(os.fspath(path)), hint="give a file")
    os.set_blocking(handle, True)
    return os.fdopen(handle, "rb")


def check_regular(
    path: Path | str,
    *,
    folder: Path | str | None = None,
    typed: bool = False,
    error: type[ClozeError] = DataError,
) -> Path:
    """Return the path to open, for a library that opens files itself. Raises `error` as `open_regular`."""
    path = Path(path)
    try:
        if not typed:
            path = _without_links(path, Path(folder) if folder is not None else path.parent, error)
        mode = os.stat(path, follow_symlinks=typed).st_mode
    except (OSError, ValueError) as problem:
        raise _cannot_be_read(path, problem, error) from None
    if not _is_readable(mode, path, typed):
        what = "a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file"
        raise error(what, where=printable(str(path)), hint="give a file")
    return path


def read_bytes(
    path: Path | str,
    max_bytes: int,
    *,
    folder: Path | str | None = None,
    typed: bool = False,
    error: type[ClozeError] = DataError,
) -> bytes:
    """Return the bytes of a regular file. Raises `error` as `open_regular`, and if there are more than `max_bytes`."""
    try:
        with open_regular(path, folder=folder, typed=typed, error=error) as file:
            content = file.read(max_bytes + 1)
    except OSError as problem:
        raise _cannot_be_read(path, problem, error) from None
    if len(content) > max_bytes:
        raise error(
            f"is larger than {size_text(max_bytes)}", where=printable(os.fspath(path)), hint="give the right file"
        )
    return content


def read_text(
    path: Path | str,
    max_bytes: int,
    *,
    folder: Path | str | None = None,
    typed: bool = False,
    error: type[ClozeError] = DataError,
) -> str:
    """Return the text of a UTF-8 file, without a byte-order mark. Raises `error` as `read_bytes`, and for other
    encodings."""
    content = read_bytes(path, max_bytes, folder=folder, typed=typed, error=error)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        what = f"not UTF-8 at byte {problem.start}"
        raise error(what, where=printable(os.fspath(path)), hint="save it as UTF-8") from None


def printable(text: str) -> str:
    """Return a name or a value for a message: unprintable characters escaped, at most 200 characters."""
    shown = text if text.isprintable() else text.encode("unicode_escape", "surrogatepass").decode("ascii")
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def visible(text: str) -> str:
    """Return a text of one or more lines without what a terminal would obey: control characters but line ends and
    tabs, and marks that reverse the order of what follows, are escaped."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def visible_in_colour(text: str) -> str:
    """Return a text as `visible` does, but with the ANSI sequences for colours and bold text as they are."""
    return "".join(part if number % 2 else visible(part) for number, part in enumerate(_COLOURS.split(text)))


def size_text(count: int) -> str:
    """Return a number of bytes in words: `64 MiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024 or count % 1024:
            return f"{count} {unit}"
        count >>= 10
    return f"{count} GiB"


def _is_readable(mode: int, path: Path | str, typed: bool) -> bool:
    return stat.S_ISREG(mode) or (typed and stat.S_ISFIFO(mode) and os.fspath(path).startswith("/dev/fd/"))


def _without_links(path: Path, folder: Path, error: type[ClozeError]) -> Path:
    """Return `path`, or the target of a link inside the Hub's cache."""
    inside = path.relative_to(folder).parts
    if ".." in inside:
        raise error("names a file outside its folder", where=printable(str(path)), hint="do not use it")
    current = folder
    for part in inside:
        current = current / part
        if current.is_symlink():
            target = _in_hub_cache(current)
            if target is None or current != path:
                raise error("is a symbolic link", where=printable(str(current)), hint=_COPY_IT)
            return target
    return path


def _in_hub_cache(link: Path) -> Path | None:
    """Return the target of a link of a snapshot, if it is a blob of the same repository; None if not."""
    parts = Path(os.path.abspath(link)).parts
    for number in range(len(parts) - 2, 0, -1):
        if parts[number] == "snapshots" and "--" in parts[number - 1]:
            repository = Path(*parts[:number])
            target = Path(os.path.realpath(link))
            blobs = Path(os.path.realpath(repository)) / "blobs"
            return target if target.parent == blobs else None
    return None


def _cannot_be_read(path: Path | str, problem: Exception, error: type[ClozeError]) -> ClozeError:
    number = getattr(problem, "errno", None)
    if number == errno.ELOOP:
        return error("is a symbolic link", where=printable(os.fspath(path)), hint=_COPY_IT)
    why = getattr(problem, "strerror", None) or problem  # ValueError: a NUL in the path
    return error(f"cannot be read ({why})", where=printable(os.fspath(path)), hint="check the path")


def names_below(folder: Path) -> list[str]:
    """Return the relative paths of the regular files below a folder, sorted. Raises DataError for a link."""
    found = []
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            entry = Path(root) / name
            if entry.is_symlink() or name in files:
                check_regular(entry, folder=folder)
                found.append(PurePosixPath(entry.relative_to(folder)).as_posix())
    return sorted(found)


def temporary_name(final: Path) -> Path:
    """Return an unpredictable name beside `final`, so that no other user can have put a link there."""
    return final.with_name(f"{final.name}.tmp-{secrets.token_hex(8)}")


def write_new(path: Path, text: str) -> None:
    """Create a file with a text (UTF-8); leave nothing if that fails. Raises FileExistsError
    if there is anything of that name, a link too."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
