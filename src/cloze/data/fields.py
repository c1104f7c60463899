"""From a record to a document: which of its fields are the text, and which names it.

    fields = Fields.parse("title,answers.text", id_field=None)
    document = fields.document({"q_id": "5ld1qa", "title": "Why?", "answers": {"text": ["So.", "Hence."]}})
    document.text                       # "Why? So. Hence."

Dots go into nested fields, lists are joined by a space as the Hugging Face tutorial does with `answers.text`, and
lists of records are gone through (`output.answer` of KILT). A record that has no text there raises BadRecord.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

from cloze.errors import DataError

Record = dict[str, Any]
ID_FIELDS = ("q_id", "id")


class BadRecord(Exception):
    """What is wrong with one record, in a few words; whoever reads knows its place. See --on_bad_record."""


class Document(NamedTuple):
    """One text of the corpus and the name that decides on which side of the split it falls."""

    id: str
    text: str


@dataclass(frozen=True)
class Fields:
    """Where in a record the text and the id are. `text` holds one path of keys per field; None: the field `text`."""

    text: tuple[tuple[str, ...], ...]
    id: tuple[str, ...] | None = None

    @classmethod
    def parse(cls, text_field: str | None, id_field: str | None) -> Fields:
        """Read `title,answers.text`. Without a text_field it is `text`."""
        names = [name.strip() for name in (text_field or "text").split(",")]
        return cls(tuple(_path(name) for name in names if name), _path(id_field) if id_field else None)

    def document(self, record: Record) -> Document:
        """The document of a record. Raises BadRecord where there is none."""
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
        """The value of the id field; else of `q_id` or `id`; else a hash of the text."""
        if self.id is not None:
            return _name(_at(record, self.id), ".".join(self.id))
        for name in ID_FIELDS:
            value = record.get(name)
            if value is not None and value != "":
                return _name(value, name)
        return hash_of(text)

    def columns(self) -> set[str]:
        """The top-level fields that are needed."""
        return {path[0] for path in self.text} | ({self.id[0]} if self.id else set(ID_FIELDS))

    def check(self, record: Record, where: str) -> None:
        """Raise DataError with the fields there are if this record, a corpus's first, lacks one that is needed."""
        known = ", ".join(field_names(record))
        wanted = [(path, "--text_field") for path in self.text]
        for path, flag in [*wanted, (self.id, "--id_field")] if self.id else wanted:
            try:
                _at(record, path)
            except BadRecord as error:
                raise DataError(str(error), where=where, hint=f"the fields are: {known}; set {flag}") from None


def hash_of(text: str) -> str:
    """The name of a document that has none of its own."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def field_names(record: Record, prefix: str = "") -> list[str]:
    """All fields of a record, nested ones with dots."""
    names = []
    for key, value in record.items():
        inner = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        names += field_names(inner, f"{prefix}{key}.") if isinstance(inner, dict) else [f"{prefix}{key}"]
    return names


def _path(name: str) -> tuple[str, ...]:
    return tuple(name.replace("[]", "").split("."))


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for depth, key in enumerate(path):
        if isinstance(value, dict):
            if key not in value:
                raise BadRecord(f"no field {'.'.join(path)!r}")
            value = value[key]
        elif isinstance(value, list):
            return [_at(item, path[depth:]) for item in value if isinstance(item, dict) and path[depth] in item]
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


def _text(value: Any, path: tuple[str, ...]) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [text for text in (_text(item, path) for item in value) if text is not None]
        return " ".join(texts) if texts or not value else None
    raise BadRecord(f"field {'.'.join(path)!r} is {type(value).__name__}, not text")


def _name(value: Any, field: str) -> str:
    if isinstance(value, str | int | float):
        return str(value)
    raise BadRecord(f"field {field!r} is {type(value).__name__}, not a name")
