"""Convert records to documents: select the fields that hold the text and the id.

    fields = Fields.parse("title,answers.text", id_field=None)
    document = fields.document({"q_id": "5ld1qa", "title": "Why?", "answers": {"text": ["So.", "Hence."]}})
    document.text                       # "Why? So. Hence."

A field is looked up under its full name first (`answers.text`, as `Dataset.flatten()` names it), then dots lead into
nested fields. Lists are joined by a space, as in the Hugging Face tutorial, also through lists of records
(`output.answer` of KILT). A record without text in these fields raises BadRecord.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from cloze.errors import ConfigError, DataError
from cloze.utils.foreign.text_lines import looks_western

Record = dict[str, Any]
ID_FIELDS = ("q_id", "id")
INVALID_UTF8 = "invalid UTF-8"
MAX_LIST_DEPTH = 16  # of lists inside lists in a text
_SHOWN_NAMES, _SHOWN_CHARACTERS, _SHOWN_DEPTH = 40, 60, 8


class BadRecord(Exception):
    """An error in one record, without its place, which the reader adds. See --on_bad_record. `hint`: how to fix it."""

    def __init__(self, what: str, hint: str = "correct it"):
        super().__init__(what)
        self.hint = hint


def invalid_utf8(raw: bytes | str = b"") -> BadRecord:
    """Return the error for bytes that are not UTF-8, or for a text that was decoded with `surrogateescape`."""
    raw = raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogateescape")
    how = "if it is Western European text: iconv -f CP1252 -t UTF-8 OLD > NEW"
    hint = f"convert the file into UTF-8, {how if looks_western(raw) else 'from the encoding that it was written in'}"
    return BadRecord(INVALID_UTF8, hint)


class Document(NamedTuple):
    """One text of the corpus, and the id that determines its split."""

    id: str
    text: str


@dataclass(frozen=True)
class Fields:
    """The paths of text and id in a record. `text` holds one path of keys per field; None: the field `text`."""

    text: tuple[tuple[str, ...], ...]
    id: tuple[str, ...] | None = None

    @classmethod
    def parse(cls, text_field: str | None, id_field: str | None) -> Fields:
        """Parse a list of fields, such as `title,answers.text`; None means `text`. Raises ConfigError."""
        names = (text_field or "text").split(",")
        if len(names) > 1:  # a single name may begin or end with a space
            names = [name.strip() for name in names if name.strip()]
        if not names or len(set(names)) < len(names):
            what = f"names {_twice(names)!r} twice" if names else "names no field"
            raise ConfigError(what, where="--text_field", hint="write the fields with commas: title,answers.text")
        return cls(tuple(map(_path, names)), _path(id_field) if id_field else None)

    def document(self, record: Record) -> Document:
        """Return the document of a record. Raises BadRecord if it has no text."""
        if len(self.text) == 1:
            text = _text_at(record, self.text[0])
            if text is None:
                raise BadRecord("null text")
        else:
            texts = [_text_at(record, path) for path in self.text]
            if all(text is None for text in texts):
                raise BadRecord("null text")
            text = " ".join(text for text in texts if text is not None and text.strip())
        return Document(self.id_of(record, text), text)

    def id_of(self, record: Record, text: str) -> str:
        """Return the value of the id field; else of `q_id` or `id`, if it is a name; else a hash of the text."""
        if self.id is not None:
            return _name(_at(record, self.id), ".".join(self.id))
        for name in ID_FIELDS:
            value = record.get(name)
            if isinstance(value, str | int | float) and value != "":
                return str(value)
        return hash_of(text)

    def check(self, record: Record, where: str) -> None:
        """Raise DataError with the existing fields if this record, a corpus's first, lacks a required one."""
        wanted = [(path, "--text_field") for path in self.text]
        for path, flag in [*wanted, (self.id, "--id_field")] if self.id else wanted:
            try:
                _at(record, path)
            except BadRecord as error:
                raise missing_field(str(error), where, field_names(record), flag) from None


def missing_field(what: str, where: object, names: Iterable[str], flag: str) -> DataError:
    """Return the error for a missing field; `names`: the existing fields, of which the first are shown."""
    names = iter(names)
    shown = [_short(name) for name in islice(names, _SHOWN_NAMES)]
    more = ", ..." if next(names, None) is not None else ""
    todo = "; rename a field with a comma in its name" if any("," in name for name in shown) else ""
    return DataError(what, where=where, hint=f"the fields are: {', '.join(shown)}{more}; set {flag}{todo}")


def _short(name: str) -> str:
    """Return a field's name for a message: shortened, and in quotes if it could be misread."""
    name = name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}..."
    return repr(name) if name != name.strip() or "," in name or not name else name


def _twice(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def repeated_column(column: str, count: int, where: object) -> DataError:
    """Return the error for a table in which `count` columns have the required name."""
    return DataError(f"has {count} columns {column!r}", where=where, hint="give each its own name")


def hash_of(text: str) -> str:
    """Return the id of a document without one: a hash of its text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def field_names(record: Record, prefix: str = "", depth: int = 0) -> Iterable[str]:
    """Yield the fields of a record, nested ones with dots, to a limited depth."""
    for key, value in record.items():
        inner = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        if inner is not value:  # a path into it would join its records into one text
            yield f"{prefix}{key} (a list of records)"
        elif isinstance(inner, dict) and inner and depth < _SHOWN_DEPTH:
            yield from field_names(inner, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}"


def find_key(names: Any, path: tuple[str, ...]) -> tuple[str, int]:
    """Return the longest of `names` that the path begins with, and its number of parts; ("", 0) if no name matches.

    `answers[]` is looked up as it is written first, then as `answers`.
    """
    for count in range(len(path), 0, -1):
        key = ".".join(path[:count])
        if key in names:
            return key, count
        if "[]" in key and (key := key.replace("[]", "")) in names:
            return key, count
    return "", 0


class Joined(NamedTuple):
    """A list whose texts are joined into one document. `query`: its elements in jq's language; `texts`: their number
    in the record; `of_records`: the path leads through a list of records."""

    field: str
    query: str
    texts: int
    of_records: bool


def joined_texts(record: Record, path: tuple[str, ...]) -> Joined | None:
    """Return the list that a path leads through, or to; None if the record has one value there."""
    value, at, query, of_records = record, 0, "", ""
    while at < len(path):
        if isinstance(value, list):
            value = next((item for item in value if isinstance(item, dict) and find_key(item, path[at:])[1]), None)
            of_records = query = f"{query}[]"
        key, count = find_key(value, path[at:]) if isinstance(value, dict) else ("", 0)
        if not count:
            break
        value, at, query = value[key], at + count, f"{query}[{json.dumps(key)}]"
    if not of_records and not isinstance(value, list):
        return None
    query = f".{of_records or query + '[]'}"
    return Joined(".".join(path), query, _count(_at(record, path)), bool(of_records))


def _count(value: Any) -> int:
    return sum(map(_count, value)) if isinstance(value, list) else isinstance(value, str)


def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def _at(value: Any, path: tuple[str, ...]) -> Any:
    at = 0
    while at < len(path):
        if isinstance(value, dict):
            key, count = find_key(value, path[at:])
            if not count:
                raise BadRecord(f"no field {'.'.join(path)!r}")
            value = value[key]
            at += count
        elif isinstance(value, list):
            rest = path[at:]
            return [_at(item, rest) for item in value if isinstance(item, dict) and find_key(item, rest)[1]]
        elif value is None:
            return None
        else:
            raise BadRecord(f"no field {'.'.join(path)!r}")
    return value


def _text_at(record: Record, path: tuple[str, ...]) -> str | None:
    value = _at(record, path)
    try:
        return value if isinstance(value, str) else " ".join(value) if isinstance(value, list) else _text(value, path)
    except TypeError:
        return _text(value, path)


def _text(value: Any, path: tuple[str, ...], depth: int = 0) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if depth == MAX_LIST_DEPTH:
        raise BadRecord(f"field {'.'.join(path)!r} has lists nested more than {MAX_LIST_DEPTH} deep")
    if isinstance(value, list):
        texts = [text for text in (_text(item, path, depth + 1) for item in value) if text is not None]
        return " ".join(texts) if texts or not value else None
    raise BadRecord(f"field {'.'.join(path)!r} is {type(value).__name__}, not text")


def _name(value: Any, field: str) -> str:
    if isinstance(value, str | int | float):
        return str(value)
    raise BadRecord(f"field {field!r} is {type(value).__name__}, not a name")
