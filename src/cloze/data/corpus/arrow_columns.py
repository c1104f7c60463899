"""Read documents from Arrow tables. Texts are joined column by column, which is many times faster than row by row.

for position, raw in documents(batch, fields, first_row=0):     # raw: a Document, or a record to look at closely
    ...
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.compute

from cloze.data.corpus.fields import (
    ID_FIELDS,
    MAX_LIST_DEPTH,
    BadRecord,
    Document,
    Fields,
    Record,
    find_key,
    hash_of,
    invalid_utf8,
    missing_field,
    repeated_column,
)

BATCH_ROWS = 1000


def is_unicode(text: str) -> bool:
    """Return whether a text, decoded with `surrogateescape`, was valid UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def resolved(schema: Any, fields: Fields, name: str) -> Fields:
    """Return the fields with the keys that this table has: `("answers.text",)` if a column is called so, else
    `("answers", "text")`. Raises DataError if the table lacks one that is named."""
    paths: dict[tuple[str, ...], tuple[str, ...]] = {}
    named = [*fields.text, *([fields.id] if fields.id else [])]
    tops = {find_key(schema.names, path)[0] for path in named}
    for column in sorted(tops | (set() if fields.id else {*ID_FIELDS})):
        if (count := schema.names.count(column)) > 1:
            raise repeated_column(column, count, name)
    for path in named:
        found = _keys(schema, path)
        if found is None:
            flag = "--id_field" if path == fields.id else "--text_field"
            raise missing_field(f"no field {'.'.join(path)!r}", name, _leaves(schema), flag)
        paths[path] = found
    return Fields(tuple(paths[path] for path in fields.text), paths[fields.id] if fields.id else None)


def needed(schema: Any, fields: Fields) -> list[str]:
    """Return the columns of a Parquet file to read for fields that are `resolved`."""
    ids = [fields.id] if fields.id else [(name,) for name in ID_FIELDS if name in schema.names]
    paths = dict.fromkeys([*fields.text, *ids])
    narrow = {path[0]: ".".join(path) for path in paths if _through_structs(schema, path)}
    tops = [path[0] for path in paths]
    return [narrow[top] if tops.count(top) == 1 and top in narrow else top for top in dict.fromkeys(tops)]


def documents(batch: Any, fields: Fields, first_row: int) -> Iterator[tuple[int, Document | Record | BadRecord]]:
    """Yield the row number (from 0) and the document of each row; its record, if the row needs the slow path."""
    texts = _texts(batch, fields)
    names = _names(batch, fields)
    if texts is None or names is None:
        for number in range(len(batch)):
            yield first_row + number, _record(batch, number)
        return
    for number, (text, name) in enumerate(zip(texts, names, strict=True)):
        if text is None:
            yield first_row + number, _record(batch, number)
        else:
            yield first_row + number, Document(hash_of(text) if name is None or name == "" else str(name), text)


def _record(batch: Any, number: int) -> Record | BadRecord:
    try:
        return dict(batch.slice(number, 1).to_pylist()[0])
    except UnicodeDecodeError:
        return invalid_utf8()


def _texts(batch: Any, fields: Fields) -> list[str | None] | None:
    """Return the text of every row; None for a row, or for all, if columns are not strings or lists of them."""
    if len(fields.text) > 1:
        return None
    column = _column(batch, fields.text[0])
    if column is None:
        return None
    try:
        if _is_list(column.type):
            if not _is_string(column.type.value_type):
                return None
            column = pyarrow.compute.binary_join(column, " ")
        return list(column.to_pylist()) if _is_string(column.type) else None
    except UnicodeDecodeError:
        return None


def _names(batch: Any, fields: Fields) -> list[Any] | None:
    """Return the id of every row if one column of strings or integers has them all, else None."""
    paths = [fields.id] if fields.id else [(name,) for name in ID_FIELDS if name in batch.schema.names]
    if not paths:
        return [None] * len(batch)
    column = _column(batch, paths[0])
    plain = column is not None and (_is_string(column.type) or pyarrow.types.is_integer(column.type))
    if not plain or column.null_count:
        return None
    try:
        names = column.to_pylist()
    except UnicodeDecodeError:
        return None
    return None if "" in names and (fields.id or len(paths) > 1) else list(names)


def _column(batch: Any, path: tuple[str, ...]) -> Any:
    column = batch.column(path[0]) if path[0] in batch.schema.names else None
    for key in path[1:]:
        if column is None or not pyarrow.types.is_struct(column.type) or column.type.get_field_index(key) < 0:
            return None
        column = pyarrow.compute.struct_field(column, key)
    return column


def _is_string(kind: Any) -> bool:
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _keys(kind: Any, path: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the names that a path stands for in a schema or type, through structs and lists; None if it does not
    exist."""
    while not isinstance(kind, pyarrow.Schema) and _is_list(kind):
        kind = kind.value_type
    if not path:
        return ()
    if not isinstance(kind, pyarrow.Schema) and not pyarrow.types.is_struct(kind):
        return None
    key, count = find_key([field.name for field in kind], path)
    if not count or kind.get_field_index(key) < 0:  # -1 also if two have this name
        return None
    rest = _keys(kind.field(key).type, path[count:])
    return None if rest is None else (key, *rest)


def _is_list(kind: Any) -> bool:
    return bool(pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind))


def _through_structs(schema: Any, path: tuple[str, ...]) -> bool:
    kind = schema.field(path[0]).type
    for key in path[1:]:
        if not pyarrow.types.is_struct(kind):
            return False
        kind = kind.field(key).type
    return True


def _leaves(kind: Any, prefix: str = "", depth: int = 0) -> Iterator[str]:
    for field in kind:
        if pyarrow.types.is_struct(field.type) and depth < MAX_LIST_DEPTH:
            yield from _leaves(field.type, f"{prefix}{field.name}.", depth + 1)
        elif _is_list(field.type) and pyarrow.types.is_struct(field.type.value_type):
            yield f"{prefix}{field.name} (a list of records)"
        else:
            yield f"{prefix}{field.name}"
