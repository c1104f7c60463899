"""Files of one record a line: cutting them anywhere without losing or doubling a line, and parsing JSON lines.

for start, stop, size in cut_lines(total_bytes, size=32 * 2**20):
    for position, line in lines_between(file, start, stop, max_bytes=64 * 2**20):
        record = parse_line(line)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import orjson

from cloze.data.corpus.fields import BadRecord, Record, invalid_utf8
from cloze.utils.foreign.text_lines import without_mark

_BUFFER = 2**20


def cut_lines(total: int, size: int) -> list[tuple[int, int, int]]:
    """Return (start, stop, bytes) of the pieces of a file: piece k holds the lines that begin in [k * size, (k + 1) *
    size)."""
    ends = [*range(size, total, size), total]
    return [(start, stop, stop - start) for start, stop in zip([0, *ends], ends, strict=False)]


def lines_between(file: Any, start: int, stop: int | None, max_bytes: int) -> Iterator[tuple[int, bytes | BadRecord]]:
    """Yield the lines that begin in bytes [start, stop), each with its first byte; without `stop`, all with their
    number.

    A line ends with LF, CR LF or CR. Pieces are cut at LF only: what is between two LF belongs to one piece. A line
    above `max_bytes` is not kept: it comes as a BadRecord. A UTF-8 mark is no part of a line.
    """
    position = start
    if position:
        file.seek(position - 1)
        position = position - 1 + _skip_line(file, stop)
    number = 0
    while stop is None or position < stop:
        line = file.readline(max_bytes + 1)
        if not line:
            return
        size = len(line)
        if size > max_bytes and not line.endswith(b"\n"):
            size += _skip_line(file, None)
            number += 1
            yield (number if stop is None else position), BadRecord(f"larger than {max_bytes // 2**20} MiB")
        elif line.find(b"\r", 0, -2) < 0:
            number += 1
            yield (number if stop is None else position), without_mark(line)
        else:
            at = position
            for part in line.splitlines(keepends=True):  # of bytes: at LF, CR LF and CR only
                number += 1
                yield (number if stop is None else at), without_mark(part)
                at += len(part)
        position += size


def count_lines(block: bytes) -> int:
    """Return how many lines end in a block of bytes."""
    return block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")


def _skip_line(file: Any, stop: int | None) -> int:
    """Skip to after the next newline (or after byte `stop`, if that comes first); return the number of bytes
    skipped."""
    skipped, begin = 0, file.tell() if stop is not None else 0
    while part := file.readline(_BUFFER):
        skipped += len(part)
        if part.endswith(b"\n") or (stop is not None and begin + skipped > stop):
            break
    return skipped


def parse_line(line: bytes) -> Record:
    """Return the record of a JSON line. Raises BadRecord. Lone surrogates become U+FFFD, as no tokenizer takes
    them."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _parse_slowly(line)
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object")
    return record


def _parse_slowly(line: bytes) -> Any:
    """Parse with Python's parser, which accepts lone surrogates and huge numbers and explains other errors."""
    try:
        return without_surrogates(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError:
        raise invalid_utf8(line) from None
    except json.JSONDecodeError as error:
        raise BadRecord(f"not JSON ({error.msg})") from None
    except (ValueError, RecursionError):  # a number of thousands of digits; thousands of brackets
        raise BadRecord("not JSON that can be read") from None


def without_surrogates(value: Any) -> Any:
    """Return a parsed value with U+FFFD in place of each lone surrogate."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(item) for key, item in value.items()}
    return value
