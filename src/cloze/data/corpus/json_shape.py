"""Recognize JSON files without one record per line, and suggest the command that converts them.

Read line by line such a file is one record, or none, and the fields that it seems to have mislead: the record that
wraps all others has a field `data.text`, and taking it makes one document of a whole corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloze.data.corpus.fields import ID_FIELDS, BadRecord, Fields, find_key
from cloze.errors import DataError
from cloze.utils.terminal.console import warn

HEAD_BYTES = 2**20
_MAX_DEPTH = 8
_FIRST_RECORDS = 100
_SPACE = " \t\r\n"
_decode = json.JSONDecoder().raw_decode


def check_shape(head: bytes, name: Path, fields: Fields, is_alone: bool) -> None:
    """Raise DataError for a file, by its first HEAD_BYTES, that holds records, but not one a line.

    `is_alone`: the corpus is this file, so that one record in it would be the only one.
    """
    text = head.decode("utf-8", "replace").lstrip("\ufeff" + _SPACE)
    if not text.startswith("{"):
        return
    line = text.split("\n", 1)[0]
    try:
        record, end = _decode(text)
    except (ValueError, RecursionError):
        if len(head) >= HEAD_BYTES:
            _check_start(text, name, fields)
        return
    rest, ends_in_line = text[end:], end <= len(line)
    after = rest.lstrip(" \t\r" if ends_in_line else _SPACE)
    if after.startswith("{"):
        what = "several records on one line" if ends_in_line else "records of several lines each"
        raise DataError(what, where=name, hint="write one record a line: jq -c . OLD > NEW.jsonl")
    if after.startswith(",") and after[1:].lstrip(_SPACE)[:1] in ("{", ""):
        hint = "write one record a line, without commas: sed 's/,[[:space:]]*$//' OLD > NEW.jsonl"
        raise DataError("a comma after each record", where=name, hint=hint)
    if not rest.strip() and len(head) < HEAD_BYTES:
        _check_single(record, name, fields, is_alone)
        if not ends_in_line:
            hint = "write one record a line: jq -c . OLD > NEW.jsonl"
            raise DataError("one record of several lines", where=name, hint=hint)


def warn_of_repeated_names(head: bytes, name: Path, fields: Fields) -> None:
    """Print a warning if one of the first records gives a field of text or id twice: parsers keep the last value."""
    text = head.decode("utf-8", "replace").lstrip("\ufeff")
    paths = [*fields.text, *([fields.id] if fields.id else [(field,) for field in ID_FIELDS])]
    wanted = {part for path in paths for part in (*path, ".".join(path))}
    repeated: list[str] = []

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs if key in wanted]
        repeated.extend(key for key in keys if keys.count(key) > 1)
        return dict(pairs)

    decode, at = json.JSONDecoder(object_pairs_hook=as_dict).raw_decode, 0
    for number in range(1, _FIRST_RECORDS + 1):
        try:
            _, at = decode(text, _past(text, at, _SPACE + "[,"))
        except (ValueError, IndexError, RecursionError):
            return
        if repeated:
            return warn(f"{name}, record {number} has several fields {repeated[0]!r}; the last of them is read")


def _check_single(record: dict[str, Any], name: Path, fields: Fields, is_alone: bool) -> None:
    """Raise DataError if the only record of a file holds others."""
    is_missing = any(_is_missing(record, path) for path in fields.text)
    tops = [find_key(record, path)[0] for path in fields.text]
    lists = sorted(_lists_of_records(record), key=lambda found: -found[2]) if is_missing else []
    for keys, first, count in lists:
        if not _is_missing(first, fields.text[0]):
            raise _wrapped(name, keys, count)
    lengths = [len(value) for value in record.values() if isinstance(value, list | dict) and len(value) > 1]
    for top in tops:
        value = record.get(top)
        if is_alone and isinstance(value, list | dict) and len(lengths) > 1 and lengths.count(len(value)) > 1:
            raise _by_column(name)
        if is_alone and isinstance(value, dict) and value and all(key.isdigit() for key in value):
            raise _by_column(name)
    inner = [value for value in record.values() if isinstance(value, dict)]
    if is_missing and len(inner) > 1 and all(not _is_missing(value, fields.text[0]) for value in inner):
        hint = "write one record a line: jq -c '.[]' OLD > NEW.jsonl"
        raise DataError(f"one record that holds {len(inner)} others by name", where=name, hint=hint)
    if is_alone and lists:
        raise _wrapped(name, lists[0][0], lists[0][2])


def _lists_of_records(
    value: dict[str, Any], keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any], int]]:
    """Yield the keys, the first record and the length of each list of records, down to a depth of 8."""
    for key, inner in value.items():
        if isinstance(inner, list) and len(inner) > 1 and isinstance(inner[0], dict):
            yield (*keys, f"{key}[]"), inner[0], len(inner)
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            key, inner = f"{key}[]", inner[0]
        if isinstance(inner, dict) and len(keys) < _MAX_DEPTH:
            yield from _lists_of_records(inner, (*keys, key))


def _check_start(text: str, name: Path, fields: Fields) -> None:
    """Raise DataError if a record above HEAD_BYTES begins with a list of records."""
    at = 1
    try:
        while True:
            key, at = _decode(text, _past(text, at, _SPACE + ","))
            at = _past(text, at, _SPACE + ":")
            inner = _past(text, at + 1, _SPACE)
            if text[at] == "[" and text[inner] == "{" and isinstance(key, str):
                first, _ = _decode(text, inner)
                if key not in (path[0] for path in fields.text) and not _is_missing(first, fields.text[0]):
                    raise _wrapped(name, (f"{key}[]",), None)
            _, at = _decode(text, at)
    except (ValueError, IndexError, RecursionError):
        return


def _past(text: str, at: int, skipped: str) -> int:
    while text[at] in skipped:
        at += 1
    return at


def _is_missing(record: Any, path: tuple[str, ...]) -> bool:
    try:
        return Fields((path,)).document(record) is None
    except (BadRecord, AttributeError):
        return True


def _wrapped(name: Path, keys: tuple[str, ...], count: int | None) -> DataError:
    """Return the error for a list of records, whose `keys` are those on the way to it: lists have `[]` at the end."""
    field = ".".join(keys).removesuffix("[]")
    what = f"one record that holds {'the' if count is None else count} others in its field {field!r}"
    query = "".join(f"[{json.dumps(key.removesuffix('[]'))}]{'[]' * key.endswith('[]')}" for key in keys)
    return DataError(what, where=name, hint=f"write one record a line: jq -c '.{query}' OLD > NEW.jsonl")


def _by_column(name: Path) -> DataError:
    hint = "write one record a line, as pandas does with to_json(NEW, orient='records', lines=True)"
    return DataError("holds columns, not records", where=name, hint=hint)
