"""Records of local files, one at a time: json (array or lines), jsonl, parquet, arrow, csv, txt; also .gz and .zst.

    for record in read_records(Path("corpus.jsonl.gz")):      # dicts
        ...

A record that cannot be read raises DataError with the file and, where there is one, the line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from cloze.errors import DataError

Record = dict[str, Any]
COMPRESSIONS = (".gz", ".zst")
_BATCH_ROWS = 1000


def format_of(path: Path) -> str | None:
    """`corpus.jsonl.gz` -> "jsonl"; None if the extension is not one that Cloze reads."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    name = suffixes[-1][1:] if suffixes else ""
    return name if name in READERS else None


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file. Raises DataError where the file is missing, cut short or broken."""
    kind = format_of(path)
    if kind is None:
        raise DataError(
            "unknown file type", where=path, hint=f"the types are: {', '.join(READERS)}, each also .gz, .zst"
        )
    try:
        with open_binary(path) as file:
            yield from READERS[kind](file, path)
    except FileNotFoundError:
        raise DataError("no such file", where=path) from None
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason} at byte {error.start})", where=path) from None
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"cannot be read ({str(error).splitlines()[0]})", where=path, hint="is the file whole?"
        ) from None
    except (csv.Error, OSError) as error:
        packed = path.suffix.lower() in COMPRESSIONS
        raise DataError(
            f"cannot be {'unpacked' if packed else 'read'} ({error})",
            where=path,
            hint="the file is damaged or cut short; get it again" if packed else None,
        ) from None


def open_binary(path: Path) -> Any:
    """The unpacked bytes of a file; a context manager. A packed file that was cut short raises OSError at its end."""
    packing = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    return pyarrow.input_stream(str(path), compression=packing) if packing else open(path, "rb")


def _json(file: Any, path: Path) -> Iterator[Record]:
    """A JSON array of records, or one record a line, told apart by the first character."""
    text = io.TextIOWrapper(file, encoding="utf-8")
    first = text.readline()
    while first and not first.strip():
        first = text.readline()
    if first.lstrip().startswith("["):
        yield from _json_array(first + text.read(), path)
    else:
        yield from _json_lines(first, text, path)


def _json_array(text: str, path: Path) -> Iterator[Record]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error.msg})", where=f"{path}, line {error.lineno}") from None
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise DataError(f"record {number} is not an object", where=path)
        yield record


def _json_lines(first: str, text: Any, path: Path) -> Iterator[Record]:
    number, line = 1, first
    while line:
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"not JSON ({error.msg})", where=f"{path}, line {number}", hint="mend or remove that line"
                ) from None
            if not isinstance(record, dict):
                raise DataError("not a JSON object", where=f"{path}, line {number}")
            yield record
        line, number = text.readline(), number + 1


def _parquet(file: Any, path: Path) -> Iterator[Record]:
    parquet = pyarrow.parquet.ParquetFile(path if path.suffix == ".parquet" else io.BytesIO(file.read()))
    for batch in parquet.iter_batches(batch_size=_BATCH_ROWS):
        yield from batch.to_pylist()


def _arrow(file: Any, path: Path) -> Iterator[Record]:
    """The stream format that `datasets` writes, or the file format (Feather 2)."""
    magic = file.read(6)
    file.seek(0)
    if magic == b"ARROW1":
        reader = pyarrow.ipc.open_file(pyarrow.BufferReader(file.read()))
        batches: Any = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        batches = pyarrow.ipc.open_stream(file)
    for batch in batches:
        yield from batch.to_pylist()


def _csv(file: Any, path: Path) -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    yield from csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))


def _txt(file: Any, path: Path) -> Iterator[Record]:
    for line in io.TextIOWrapper(file, encoding="utf-8"):
        yield {"text": line.rstrip("\r\n")}


READERS: dict[str, Callable[[Any, Path], Iterator[Record]]] = {
    "json": _json,
    "jsonl": _json,
    "ndjson": _json,
    "parquet": _parquet,
    "arrow": _arrow,
    "csv": _csv,
    "txt": _txt,
}
