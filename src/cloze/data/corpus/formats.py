"""The kinds of files that a corpus may consist of, and how the records of each are read: one row of `FORMATS` each.

    FORMATS["csv"].read(file, piece, fields)        # (position, record) of each row

A new kind is a function here (`Format.read`), a row of the table, and a word in the help of --dataset_name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloze.data.corpus import arrow_columns
from cloze.data.corpus.csv_rows import read_rows
from cloze.data.corpus.fields import BadRecord, Document, Fields, Record, invalid_utf8
from cloze.data.corpus.json_array import read_array
from cloze.data.corpus.jsonl import cut_lines, lines_between
from cloze.data.corpus.unpack import COMPRESSIONS, open_binary
from cloze.utils.foreign.arrow_batches import BATCH_BYTES, arrow_batches, open_parquet, parquet_batches

MAX_RECORD_BYTES = 64 * 2**20
_MAX_ROWS = 10_000  # of a table at a time

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
    """Return the format of a file name, `corpus.jsonl.gz` -> "jsonl"; None if the extension is not one that Cloze
    reads."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    name = suffixes[-1][1:] if suffixes else ""
    return name if name in FORMATS else None


def _cut_text(path: Path, size: int) -> list[tuple[int, int, int]]:
    return cut_lines(path.stat().st_size, size)


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


ARRAY = Format(_json_array, "record")
LINES = Format(_jsonl, "line", _cut_text)
TEXT = Format(_txt, "line", _cut_text)
FORMATS = {
    "json": LINES,
    "jsonl": LINES,
    "ndjson": LINES,
    "parquet": Format(_parquet, "row", _cut_parquet, is_text=False),
    "arrow": Format(_arrow, "row", _cut_arrow, is_text=False),
    "csv": Format(_csv, "record"),
    "tsv": Format(_tsv, "record"),
    "txt": TEXT,
    "text": TEXT,
    "md": TEXT,
    "markdown": TEXT,
}
ONLY_ALONE = ("md", "markdown")  # beside data they are notes: a folder's are read if it holds nothing else
