"""Arrow and Parquet that another program wrote, in batches that are checked before anything in them is used.

    for batch in arrow_batches("corpus.arrow"): ...                 # offsets point into their buffers
    for rows, batch in parquet_batches(parquet, groups, names, rows=1000): ...

Arrow trusts a file: offsets that point elsewhere read other memory, or end the process (SIGBUS). So every batch is
validated in full, apart from UTF-8, which is looked at record by record. In Parquet a page of a few bytes may stand
for gigabytes, because values are named by their number in a dictionary: strings are read as such numbers, and decoded
in slices of BATCH_BYTES.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

BATCH_BYTES = 16 * 2**20
_DELTA_ROWS = 16  # at a time, of values that are written as what differs from the one before


def arrow_batches(path: Path | str) -> Iterator[Any]:
    """Return the record batches of a file, mapped into memory: of the stream format that `datasets` writes, or of the
    file format (Feather 2). Raises pyarrow.ArrowInvalid, then or later, if the file is not right."""
    source = pyarrow.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(source)
        return (_checked(reader.get_batch(number)) for number in range(reader.num_record_batches))
    source.seek(0)
    return (_checked(batch) for batch in pyarrow.ipc.open_stream(source))


def parquet_batches(
    parquet: Any, groups: list[int], columns: list[str], rows: int, max_row_bytes: int
) -> Iterator[tuple[int, Any]]:
    """Yield batches of some row groups and columns, each of at most `rows` rows and, from two rows on, BATCH_BYTES:
    (number of rows, batch); (1, None) for a row above `max_row_bytes`.

    `parquet`: a ParquetFile made by `open_parquet`.
    """
    facts = parquet.metadata
    encodings = {
        encoding
        for group in groups
        for place in range(facts.num_columns)
        for encoding in facts.row_group(group).column(place).encodings
    }
    rows = min(rows, _DELTA_ROWS) if "DELTA_BYTE_ARRAY" in encodings else rows
    # One group at a time: each has a dictionary of its own, and a nested column cannot be of two.
    batches = (
        batch
        for group in groups
        for batch in parquet.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)
    )
    for batch in batches:
        for part in _slices(batch):
            if len(part) == 1 and _decoded_bytes(part) > max_row_bytes:
                yield 1, None
            else:
                yield len(part), _decoded(part)


def open_parquet(file: Any) -> Any:
    """Return a ParquetFile that gives strings as numbers in a dictionary, if they are stored so. Raises
    pyarrow.ArrowInvalid if it is none."""
    facts = pyarrow.parquet.read_metadata(file)
    file.seek(0)
    stored: set[str] = set()
    for group in range(facts.num_row_groups):
        for place in range(facts.num_columns):
            column = facts.row_group(group).column(place)
            if column.physical_type == "BYTE_ARRAY" and any("DICTIONARY" in name for name in column.encodings):
                stored.add(column.path_in_schema)
    return pyarrow.parquet.ParquetFile(file, read_dictionary=sorted(stored))


def _checked(batch: Any) -> Any:
    """Return a batch. Raises pyarrow.ArrowInvalid if its buffers do not hold what its offsets and lengths say."""
    for column in batch.columns:
        column.validate()
        kind = _as_bytes(column.type)
        (column if kind == column.type else column.view(kind)).validate(full=True)
    return batch


def _as_bytes(kind: Any) -> Any:
    """Return a type with bytes in place of strings, which a validation does not look at as UTF-8."""
    types = pyarrow.types
    if types.is_string(kind):
        return pyarrow.binary()
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    return kind


def _slices(batch: Any) -> Iterator[Any]:
    """Cut a batch in halves until each has at most BATCH_BYTES, or one row."""
    if len(batch) <= 1 or _decoded_bytes(batch) <= BATCH_BYTES:
        yield batch
        return
    half = len(batch) // 2
    yield from _slices(batch.slice(0, half))
    yield from _slices(batch.slice(half))


def _decoded_bytes(batch: Any) -> int:
    """Return the bytes of the strings that are numbers in a dictionary, once they are decoded."""
    total = 0
    for column in batch.columns:
        for leaf in _dictionaries(column):
            if not _is_binary(leaf.type.value_type):
                continue
            lengths = pyarrow.compute.binary_length(leaf.dictionary).take(leaf.indices)
            total += pyarrow.compute.sum(lengths.cast(pyarrow.int64())).as_py() or 0
    return total


def _is_binary(kind: Any) -> bool:
    types = pyarrow.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def _dictionaries(array: Any) -> Iterator[Any]:
    types = pyarrow.types
    if types.is_dictionary(array.type):
        yield array
    elif types.is_list(array.type) or types.is_large_list(array.type):
        yield from _dictionaries(array.flatten())
    elif types.is_struct(array.type):
        for child in array.flatten():
            yield from _dictionaries(child)


def _decoded(batch: Any) -> Any:
    """Return a batch with plain strings."""
    kinds = [_without_dictionary(column.type) for column in batch.columns]
    columns = [
        column if column.type == kind else column.cast(kind) for column, kind in zip(batch.columns, kinds, strict=True)
    ]
    return pyarrow.RecordBatch.from_arrays(columns, batch.schema.names)


def _without_dictionary(kind: Any) -> Any:
    types = pyarrow.types
    if types.is_dictionary(kind):
        return kind.value_type
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_without_dictionary(kind.value_type)))
    if types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_without_dictionary(kind.value_type)))
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_without_dictionary(field.type)) for field in kind])
    return kind
