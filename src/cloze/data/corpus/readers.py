"""Records of local files, one at a time, of any of the kinds in `formats`; also .gz, .zst.

    for piece in pieces_of(Path("corpus.jsonl"), size=32 * 2**20):
        for position, raw in read_piece(piece, fields):     # raw: bytes of a JSON line, a record, or a document
            ...

A file that can be entered anywhere (lines of UTF-8, Parquet row groups, Arrow batches) is cut into pieces of a fixed
size; any other is one piece. Text may be UTF-16 with a byte-order mark, and its lines may end with LF, CR LF or CR. A
record that cannot be read comes as a BadRecord with its place; a broken file raises DataError.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from cloze.data.corpus.fields import Fields
from cloze.data.corpus.formats import ARRAY, FORMATS, LINES, Format, Item, Piece, format_of
from cloze.data.corpus.json_shape import HEAD_BYTES, check_shape, warn_of_repeated_names
from cloze.data.corpus.jsonl import count_lines
from cloze.data.corpus.unpack import COMPRESSIONS, Meter, open_binary, packed_as
from cloze.errors import DataError
from cloze.utils.foreign.text_lines import is_lfs_pointer, is_plain, read_head, utf8_file, without_mark

_BUFFER = 2**20
_CHECKED_FILES = 20


def is_compressed(path: Path) -> bool:
    """Return whether a file has to be unpacked from its beginning."""
    return path.suffix.lower() in COMPRESSIONS


def pieces_of(path: Path, size: int) -> list[Piece]:
    """Return the pieces of a file, a function of its contents and `size` (bytes) only. Raises DataError if it is
    broken."""
    whole = [Piece(str(path), 0, None, _stat_size(path))]
    kind = _kind(path)
    if is_compressed(path) and not kind.is_text:
        raise DataError("is packed twice", where=path, hint="unpack it: parquet and arrow files are compressed inside")
    if kind.cut is None or is_compressed(path):
        return whole
    with file_errors(path):
        if kind.is_text:
            with open_binary(path) as file:
                if not is_plain(read_head(file), path):
                    return whole
        return [Piece(str(path), *bounds) for bounds in kind.cut(path, size)]


def read_piece(piece: Piece, fields: Fields, meter: Meter | None = None) -> Iterator[Item]:
    """Every record of a piece with its position: a line's number (in a piece that starts inside a file: its first
    byte), or a record's number. Raises DataError if the file is missing, cut short or broken."""
    path = Path(piece.path)
    kind = _kind(path, piece.stop is not None)
    with file_errors(path), open_binary(path, meter) as file:
        text = kind.is_text and piece.stop is None
        yield from kind.read(utf8_file(file, path) if text else file, piece, fields)


def place_of(piece: Piece, position: int) -> str:
    """Return a position in a piece in words: `corpus.jsonl, line 17`."""
    place = _kind(Path(piece.path), piece.stop is not None).place
    if place != "line" or piece.stop is None:
        return f"{piece.path}, {place} {position}"
    with open(piece.path, "rb") as file:  # only now, for one message, the lines before it are counted
        number, left = 1, position
        while left > 0 and (block := file.read(min(left, _BUFFER))):
            number += count_lines(block)
            left -= len(block)
    return f"{piece.path}, line {number}"


class file_errors:
    """Convert errors of a damaged file into one DataError that names it."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        packed = is_compressed(self._path)
        broken = f"damaged or cut short? Get it again; if it is not packed, remove {self._path.suffix} from its name"
        if isinstance(error, FileNotFoundError):
            raise DataError(
                "no such file", where=self._path, hint="it went away while it was read: put it back, and start again"
            ) from None
        if isinstance(error, pyarrow.ArrowException | OSError) and is_lfs_pointer(self._path):
            raise DataError("is a pointer of Git LFS", where=self._path, hint="get it with `git lfs pull`") from None
        if isinstance(error, pyarrow.ArrowInvalid | pyarrow.ArrowNotImplementedError | pyarrow.ArrowTypeError):
            text = str(error).splitlines()[0]
            raise DataError(f"cannot be read ({text})", where=self._path, hint="is the file whole?") from None
        if isinstance(error, OSError):
            verb = "unpacked" if packed else "read"
            if packed and (suffix := packed_as(self._path)) not in (None, self._path.suffix.lower()):
                broken = f"it is {COMPRESSIONS[str(suffix)]} data: name it {suffix}"
            raise DataError(f"cannot be {verb} ({error})", where=self._path, hint=broken if packed else None) from None


def _stat_size(path: Path) -> int:
    with file_errors(path):
        return path.stat().st_size


def _kind(path: Path, is_cut: bool = False) -> Format:
    """Return how a file is read. `is_cut`: pieces of it are known, so that it is no JSON array."""
    name = format_of(path)
    if name is None and is_compressed(path) and is_compressed(path.with_suffix("")):
        raise DataError("is packed twice", where=path, hint="unpack it once")
    if name is None:
        packable = [name for name, kind in FORMATS.items() if kind.is_text]
        known = f"the types are: {', '.join(FORMATS)}; {', '.join(packable)} also as .gz or .zst"
        raise DataError("unknown file type", where=path, hint=known)
    if FORMATS[name] is LINES and not is_cut:
        with file_errors(path), open_binary(path) as file:
            name = "array" if _starts_array(utf8_file(file, path)) else name
    return ARRAY if name == "array" else FORMATS[name]


def _starts_array(file: Any) -> bool:
    while block := file.read(64):
        if word := without_mark(block).lstrip():
            return bool(word.startswith(b"["))
    return False


def check_shapes(files: list[Path], fields: Fields) -> None:
    """Raise DataError if one of the first JSON files holds records in another shape than one a line."""
    for path in files[:_CHECKED_FILES]:
        if (kind := _kind(path)) not in (LINES, ARRAY):
            continue
        with file_errors(path), open_binary(path) as file:
            head = read_head(utf8_file(file, path), HEAD_BYTES)
        warn_of_repeated_names(head, path, fields)
        if kind is LINES:
            check_shape(head, path, fields, len(files) == 1)
