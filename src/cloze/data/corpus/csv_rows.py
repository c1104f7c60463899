"""The rows of a CSV file as records of the columns that are needed.

A quote that is not closed swallows the rows after it, so that nothing after it can be trusted: the file is refused,
and the row in which the quote opened is named. A row that is wrong by itself is a BadRecord.

Two stray quotes swallow the rows between them. That is valid CSV, so the lines of a quoted field are compared with the
header: a row of which each line looks like a row of its own is a BadRecord. In a file of one column every line looks
like a row; there a warning names the first of such rows if rows of several lines are rare in the file.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

from cloze.data.corpus.arrow_columns import is_unicode
from cloze.data.corpus.fields import (
    ID_FIELDS,
    BadRecord,
    Fields,
    Record,
    find_key,
    invalid_utf8,
    missing_field,
    repeated_column,
)
from cloze.errors import DataError
from cloze.utils.terminal.console import warn

_OTHER_SEPARATORS = {
    "\t": "tabs; name it .tsv",
    ";": "semicolons; write it with commas",
    "|": "|; write it with commas",
}
_LINE_END = re.compile(r"\r\n|\r|\n")
_ROW_NAME = re.compile(r"[\w.:/-]*\d[\w.:/-]*", re.ASCII)
_DIGITS = re.compile(r"\d+", re.ASCII)
_RARE = 20  # rows of several lines are rare if fewer than one in this many is one


def read_rows(
    file: Any, name: str, fields: Fields, delimiter: str, max_bytes: int
) -> Iterator[tuple[int, Record | BadRecord]]:
    """Yield the number (from 1) and record of each row after the header.

    Raises DataError if a needed column is missing or there twice, or a quote is not closed.
    """
    csv.field_size_limit(max_bytes)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header, number, like_a_row = None, 0, ""
    long_rows = _LongRows(name, delimiter)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            if like_a_row:
                warn(like_a_row)
            return long_rows.warn(number)
        except csv.Error as error:
            number += 1
            yield number, _broken_row(error, name, number, line, reader.line_num)
            continue
        has_lines = reader.line_num > line
        if header is None and not any(row):
            continue  # empty lines before the header
        if header is None:
            if has_lines and _is_many_rows(row, len(row), delimiter):
                what = f"a quoted field of the header takes in lines that look like rows (up to {reader.line_num})"
                raise DataError(what, where=name, hint="correct the file: the quote is not closed")
            header = [row[0].lstrip("\ufeff"), *row[1:]]
            columns = _columns(header, fields, name)
        elif row:
            number += 1
            if has_lines and _is_many_rows(row, len(header), delimiter):
                yield number, BadRecord("a quoted field takes in lines that look like rows: is the quote closed?")
                continue
            if has_lines and len(header) == 1:
                long_rows.add(row[0], number, line)
            elif has_lines and not like_a_row and (like := _line_like_a_row(row, delimiter)):
                what = f"{name}, record {number} (line {line}) is a quoted text with a line like a row ({like[:40]!r})"
                like_a_row = f"{what}; if it is one, correct the file: the quote is not closed"
            yield number, _record(row, len(header), columns)


class _LongRows:
    """The rows of several lines of a file with one column."""

    def __init__(self, name: str, delimiter: str) -> None:
        self._name, self._delimiter = name, delimiter
        self._count, self._first, self._is_right = 0, "", False

    def add(self, text: str, number: int, line: int) -> None:
        """Take the text of record `number`, which begins in `line`."""
        lines = _LINE_END.split(text)
        # Rows outside of quotes have no separator, and are not empty.
        self._is_right |= self._delimiter in text or '"' in text or not all(map(str.strip, lines))
        if len(lines) > 2:
            self._count += 1
            self._first = self._first or f"record {number} (line {line}) is a quoted text of {len(lines)} lines"

    def warn(self, rows: int) -> None:
        """Warn if a row may hold several rows, in a file of `rows` rows."""
        if self._count and not self._is_right and self._count * _RARE <= rows:
            warn(f"{self._name}, {self._first}; if these are rows, correct the file: the quote is not closed")


def _is_many_rows(row: list[str], width: int, delimiter: str) -> bool:
    """Return whether each line of a row has as many fields as the header. In prose a space follows a comma."""
    lines = [line for line in _LINE_END.split(delimiter.join(row)) if line.strip(" ")]
    separators = (len(lines) - 1) * (width - 1)
    return separators > (delimiter == ",") and all(
        line.count(delimiter) == width - 1 and f"{delimiter} " not in line for line in lines
    )


def _line_like_a_row(row: list[str], delimiter: str) -> str | None:
    """Return a line inside a row that begins or ends with a number like the row's own first or last field."""
    lines = _LINE_END.split(delimiter.join(row))
    first, last = _shape(row[0]), _shape(row[-1])
    for line in lines[1:] if first else []:
        begin, separator, _ = line.partition(delimiter)
        if separator and _shape(begin) == first:
            return line
    for line in lines[:-1] if last else []:
        _, separator, end = line.rpartition(delimiter)
        if separator and _shape(end) == last:
            return line
    return None


def _shape(field: str) -> str | None:
    """Return a field of one word with its digits alike: `d17` -> `d0`; None if it is no such name of a row."""
    field = field.strip().strip('"')
    return _DIGITS.sub("0", field) if _ROW_NAME.fullmatch(field) else None


def _columns(header: list[str], fields: Fields, name: str) -> dict[str, int]:
    """Return the index of each needed column. Raises DataError."""
    wanted = {".".join(path): "--text_field" for path in fields.text}
    wanted |= {".".join(fields.id): "--id_field"} if fields.id else {}
    places = {}
    for column, flag in wanted.items():
        path = tuple(column.split("."))
        key, count = find_key(header, path)
        if count < len(path):
            what = f"no field {column!r}"
            for separator, words in _OTHER_SEPARATORS.items():
                if len(header) == 1 and column in header[0].split(separator):
                    raise DataError(what, where=name, hint=f"its columns are separated by {words}")
            raise missing_field(what, name, header, flag)
        if header.count(key) > 1:
            raise repeated_column(key, header.count(key), name)
        places[key] = header.index(key)
    ids = () if fields.id else ID_FIELDS
    return places | {column: header.index(column) for column in ids if column in header}


def _record(row: list[str], width: int, columns: dict[str, int]) -> Record | BadRecord:
    if len(row) < width or any(row[width:]):
        return BadRecord(f"{len(row)} fields, but the header has {width}")
    if not is_unicode("".join(row)):
        return invalid_utf8("".join(row))
    return {column: row[place] for column, place in columns.items()}


def _broken_row(error: csv.Error, name: str, number: int, first: int, last: int) -> BadRecord:
    """Return the record of a row that is damaged. Raises DataError if the rows after it cannot be trusted."""
    if "field limit" in str(error):
        raise DataError(
            f"a field is larger than {csv.field_size_limit() // 2**20} MiB",
            where=f"{name}, record {number} (line {first})",
            hint="is a quote not closed there? Correct the file",
        ) from None
    if last > first or "unexpected end" in str(error):
        raise DataError(
            f"the quote that opens here is not closed properly (read up to line {last})",
            where=f"{name}, record {number} (line {first})",
            hint="correct the file: a quote inside a quoted field is written twice",
        ) from None
    return BadRecord(f"not CSV ({error}); a quote inside a quoted field is written twice")
