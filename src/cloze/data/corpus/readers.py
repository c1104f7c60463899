"""Records of local files, one at a time: json (array or lines), jsonl, parquet, arrow, csv, tsv, txt; also .gz, .zst.

    for piece in pieces_of(Path("corpus.jsonl"), size=32 * 2**20):
        for position, raw in read_piece(piece, fields):     # raw: bytes of a JSON line, a record, or a document
            ...

A file that can be entered anywhere (lines of UTF-8, Parquet row groups, Arrow batches) is cut into pieces of a fixed
size; any other is one piece. Text may be UTF-16 with a byte-order mark, and its lines may end with LF, CR LF or CR. A
record that cannot be read comes as a BadRecord with its place; a broken file raises DataError.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow

from cloze.data.corpus import arrow_columns
from cloze.data.corpus.csv_rows import read_rows
from cloze.data.corpus.fields import BadRecord, Document, Fields, Record, invalid_utf8
from cloze.data.corpus.json_array import read_array
from cloze.data.corpus.json_shape import HEAD_BYTES, check_shape, warn_of_repeated_names
from cloze.data.corpus.jsonl import count_lines, cut_lines, lines_between
from cloze.data.corpus.unpack import COMPRESSIONS, packed_as, unpack_zstd
from cloze.errors import DataError
from cloze.utils.foreign.arrow_batches import BATCH_BYTES, arrow_batches, open_parquet, parquet_batches
from cloze.utils.foreign.text_lines import is_lfs_pointer, is_plain, read_head, utf8_file, without_mark

MAX_RECORD_BYTES = 64 * 2**20
_BUFFER = 2**20
_MAX_ROWS = 10_000  # of a table at a time
_CHECKED_FILES = 20

Raw = bytes | Record | Document | BadRecord
Item = tuple[int, Raw]


@dataclass(frozen=True)
class Piece:
    """A part of a file: bytes of lines, row groups or batches [start, stop); all of it where stop is None.

    `size` is its share of the file in bytes.
    """

    path: str
    start: int
    stop: int | None
    size: int


@dataclass(frozen=True)
class Format:
    """How one kind of file is read. `cut` gives (start, stop, bytes) of pieces of at least `size` bytes."""

    read: Callable[[Any, Piece, Fields], Iterator[Item]]
    place: str
    cut: Callable[[Path, int], list[tuple[int, int, int]]] | None = None
    is_text: bool = True


def format_of(path: Path) -> str | None:
    """`corpus.jsonl.gz` -> "jsonl"; None if the extension is not one that Cloze reads."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    name = suffixes[-1][1:] if suffixes else ""
    return name if name in FORMATS else None


def is_compressed(path: Path) -> bool:
    """Whether a file has to be unpacked from its beginning."""
    return path.suffix.lower() in COMPRESSIONS


def pieces_of(path: Path, size: int) -> list[Piece]:
    """The pieces of a file, a function of its contents and `size` (bytes) only. Raises DataError if it is broken."""
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
    byte), or a record's number. Raises DataError where the file is missing, cut short or broken."""
    path = Path(piece.path)
    kind = _kind(path, piece.stop is not None)
    with file_errors(path), open_binary(path, meter) as file:
        text = kind.is_text and piece.stop is None
        yield from kind.read(utf8_file(file, path) if text else file, piece, fields)


def place_of(piece: Piece, position: int) -> str:
    """Words for a position in a piece: `corpus.jsonl, line 17`."""
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
    """Turn what a broken file raises into one DataError naming it."""

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


def open_binary(path: Path, meter: Meter | None = None) -> Any:
    """The unpacked bytes of a file; a context manager. A packed file that was cut short raises OSError at its end."""
    packing = COMPRESSIONS.get(path.suffix.lower())
    file = open(path, "rb", buffering=_BUFFER)  # noqa: SIM115
    if meter is not None:
        meter.file = file
    if packing == "zstd":
        return unpack_zstd(file)
    return io.BufferedReader(pyarrow.input_stream(file, compression=packing), _BUFFER) if packing else file


class Meter:
    """Tells how much of a file has been read so far, before unpacking."""

    file: Any = None

    def bytes_read(self) -> int:
        """Bytes of the file, 0 before it is opened and after it is closed."""
        return self.file.tell() if self.file is not None and not self.file.closed else 0


def _stat_size(path: Path) -> int:
    with file_errors(path):
        return path.stat().st_size


def _kind(path: Path, is_cut: bool = False) -> Format:
    """Return how a file is read. `is_cut`: pieces of it are known, so that it is no JSON array."""
    name = format_of(path)
    if name is None and is_compressed(path) and is_compressed(path.with_suffix("")):
        raise DataError("is packed twice", where=path, hint="unpack it once")
    if name is None:
        known = f"the types are: {', '.join(FORMATS)}; json, csv, tsv and txt also as .gz or .zst"
        raise DataError("unknown file type", where=path, hint=known)
    if FORMATS[name] is _LINES and not is_cut:
        with file_errors(path), open_binary(path) as file:
            name = "array" if _starts_array(utf8_file(file, path)) else name
    return _ARRAY if name == "array" else FORMATS[name]


def _starts_array(file: Any) -> bool:
    while block := file.read(64):
        if word := without_mark(block).lstrip():
            return bool(word.startswith(b"["))
    return False


def _cut_text(path: Path, size: int) -> list[tuple[int, int, int]]:
    return cut_lines(path.stat().st_size, size)


def check_shapes(files: list[Path], fields: Fields) -> None:
    """Raise DataError if one of the first JSON files holds records in another shape than one a line."""
    for path in files[:_CHECKED_FILES]:
        if (kind := _kind(path)) not in (_LINES, _ARRAY):
            continue
        with file_errors(path), open_binary(path) as file:
            head = read_head(utf8_file(file, path), HEAD_BYTES)
        warn_of_repeated_names(head, path, fields)
        if kind is _LINES:
            check_shape(head, path, fields, len(files) == 1)


def _jsonl(file: Any, piece: Piece, fields: Fields) -> Iterator[Item]:
    for position, line in lines_between(file, piece.start, piece.stop, MAX_RECORD_BYTES):
        if isinstance(line, BadRecord) or (line and not line.isspace()):
            yield position, line


def _txt(file: Any, piece: Piece, fields: Fields) -> Iterator[Item]:
    for position, line in lines_between(file, piece.start, piece.stop, MAX_RECORD_BYTES):
        if isinstance(line, BadRecord):
            yield position, line
            continue
        try:
            yield position, {"text": line.decode().rstrip("\r\n")}
        except UnicodeDecodeError:
            yield position, invalid_utf8(line)


def _csv(file: Any, piece: Piece, fields: Fields) -> Iterator[Item]:
    yield from read_rows(file, piece.path, fields, ",", MAX_RECORD_BYTES)


def _tsv(file: Any, piece: Piece, fields: Fields) -> Iterator[Item]:
    yield from read_rows(file, piece.path, fields, "\t", MAX_RECORD_BYTES)


def _parquet(file: Any, piece: Piece, fields: Fields) -> Iterator[Item]:
    parquet = open_parquet(file)
    groups = range(piece.start, parquet.num_row_groups if piece.stop is None else piece.stop)
    row = sum(parquet.metadata.row_group(group).num_rows for group in range(piece.start))
    fields = arrow_columns.resolved(parquet.schema_arrow, fields, piece.path)
    names = arrow_columns.needed(parquet.schema_arrow, fields)
    facts = [parquet.metadata.row_group(group) for group in groups]
    bytes_per_row = sum(group.total_byte_size for group in facts) / max(1, sum(group.num_rows for group in facts))
    rows = max(1, min(_MAX_ROWS, int(BATCH_BYTES / max(1, bytes_per_row))))
    for count, batch in parquet_batches(parquet, list(groups), names, rows, MAX_RECORD_BYTES):
        if batch is None:
            yield row, BadRecord(f"larger than {MAX_RECORD_BYTES // 2**20} MiB")
        else:
            yield from arrow_columns.documents(batch, fields, row)
        row += count


def _cut_parquet(path: Path, size: int) -> list[tuple[int, int, int]]:
    with open_binary(path) as file:
        facts = open_parquet(file).metadata
    return _group([facts.row_group(group).total_byte_size for group in range(facts.num_row_groups)], size)


def _arrow(file: Any, piece: Piece, fields: Fields) -> Iterator[Item]:
    row = 0
    for number, batch in enumerate(arrow_batches(piece.path)):
        if piece.stop is not None and number >= piece.stop:
            return
        if number >= piece.start:
            here = arrow_columns.resolved(batch.schema, fields, piece.path)
            for first in range(0, len(batch), arrow_columns.BATCH_ROWS):
                yield from arrow_columns.documents(batch.slice(first, arrow_columns.BATCH_ROWS), here, row + first)
        row += len(batch)


def _cut_arrow(path: Path, size: int) -> list[tuple[int, int, int]]:
    return _group([batch.nbytes for batch in arrow_batches(path)], size)


def _group(sizes: list[int], least: int) -> list[tuple[int, int, int]]:
    """Cut a list of sizes into runs of at least `least` bytes: (first, end, bytes) of each."""
    groups, start, held = [], 0, 0
    for number, size in enumerate(sizes, 1):
        held += size
        if held >= least or number == len(sizes):
            groups.append((start, number, held))
            start, held = number, 0
    return groups


def _json_array(file: Any, piece: Piece, fields: Fields) -> Iterator[Item]:
    yield from read_array(file, piece.path, MAX_RECORD_BYTES)


_ARRAY = Format(_json_array, "record")
_LINES = Format(_jsonl, "line", _cut_text)
FORMATS = {
    "json": _LINES,
    "jsonl": _LINES,
    "ndjson": _LINES,
    "parquet": Format(_parquet, "row", _cut_parquet, is_text=False),
    "arrow": Format(_arrow, "row", _cut_arrow, is_text=False),
    "csv": Format(_csv, "record"),
    "tsv": Format(_tsv, "record"),
    "txt": Format(_txt, "line", _cut_text),
}
