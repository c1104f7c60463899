"""Arrow and Parquet that another program wrote, in batches that are checked before anything in them is used.

    for batch in arrow_batches("corpus.arrow"): ...                 # offsets point into their buffers
    for rows, batch in parquet_batches(parquet, groups, names, rows=1000): ...

Arrow trusts a file: offsets that point elsewhere read other memory, or end the process (SIGBUS). So every batch is
validated in full, apart from UTF-8, which is looked at record by record. In Parquet a page of a few bytes may stand
for gigabytes, because values are named by their number in a dictionary: strings are read as such numbers, and decoded
in slices of BATCH_BYTES.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

BATCH_BYTES = 16 * 2**20
_END_MARK = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of a stream: a message of no bytes
_TWO_FILES = b"PAR1PAR1"  # the end of a Parquet file and the beginning of another
_DELTA_ROWS = 16  # at a time, of values that are written as what differs from the one before


def arrow_batches(path: Path | str) -> Iterator[Any]:
    """Return the record batches of a file, mapped into memory: of the stream format that `datasets` writes, or of the
    file format (Feather 2). Raises pyarrow.ArrowInvalid, then or later, if the file is not right."""
    source = pyarrow.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        _refuse_two_feather_files(source)
        reader = pyarrow.ipc.open_file(source)
        return (_checked(reader.get_batch(number)) for number in range(reader.num_record_batches))
    source.seek(0)
    return _stream_batches(source)


def _refuse_two_feather_files(source: Any) -> None:
    """Raise pyarrow.ArrowInvalid if other bytes are between the batches of a file and its description: a file with
    another one behind it has the description of the second, and the batches of the first are found by it."""
    size = source.size()
    source.seek(max(0, size - 10))  # the length of the description, 4 bytes, and ARROW1
    described = size - 10 - int.from_bytes(source.read(4), "little")
    source.seek(8)
    messages = pyarrow.ipc.MessageReader.open_stream(source)
    try:
        while True:
            messages.read_next_message()
    except StopIteration:
        end = source.tell()
    except (OSError, ValueError):  # without an end mark, as old versions wrote it, or damaged
        return
    if end < described:
        raise pyarrow.ArrowInvalid(f"the batches end at byte {end:,} of {size:,}, and other bytes follow")


def _stream_batches(source: Any) -> Iterator[Any]:
    """Yield the batches of a stream. Raises pyarrow.ArrowInvalid if its end mark is missing or does not end the file:
    zero bytes and the end of a file also end a stream, so that what was lost would not be noticed."""
    for batch in pyarrow.ipc.open_stream(source):
        yield _checked(batch)
    end, size = source.tell(), source.size()
    source.seek(max(0, end - len(_END_MARK)))
    if source.read(len(_END_MARK)) != _END_MARK:
        raise pyarrow.ArrowInvalid(f"the Arrow stream stops at byte {end:,} of {size:,} without its end mark")
    if end != size:
        raise pyarrow.ArrowInvalid(f"the Arrow stream ends at byte {end:,} of {size:,}, and other bytes follow")


def parquet_batches(
    parquet: Any, groups: list[int], columns: list[str], rows: int, max_row_bytes: int
) -> Iterator[tuple[int, Any]]:
    """Yield batches of some row groups and columns, each of at most `rows` rows and, from two rows on, BATCH_BYTES:
    (number of rows, batch); (1, None) for a row above `max_row_bytes`. Raises pyarrow.ArrowInvalid if the pages of a
    group hold another number of rows than the description of the file says.

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
    for batch in (batch for group in groups for batch in _group_batches(parquet, group, columns, rows)):
        for part in _slices(batch):
            if len(part) == 1 and _decoded_bytes(part) > max_row_bytes:
                yield 1, None
            else:
                yield len(part), _decoded(part)


def _group_batches(parquet: Any, group: int, columns: list[str], rows: int) -> Iterator[Any]:
    """Yield the batches of a row group. Raises pyarrow.ArrowInvalid if they are not as long as its description says:
    pyarrow believes the number in the header of each page, and skips what follows."""
    expected, found = parquet.metadata.row_group(group).num_rows, 0
    for batch in parquet.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
        found += len(batch)
        yield batch
    if found != expected:
        raise pyarrow.ArrowInvalid(f"row group {group} has {found:,} rows, its description says {expected:,}")


def open_parquet(file: Any) -> Any:
    """Return a ParquetFile that gives strings as numbers in a dictionary, if they are stored so. Raises
    pyarrow.ArrowInvalid if it is not such a file."""
    facts = pyarrow.parquet.read_metadata(file)
    if facts.num_rows != (rows := sum(facts.row_group(group).num_rows for group in range(facts.num_row_groups))):
        raise pyarrow.ArrowInvalid(f"its description says {facts.num_rows:,} rows, those of its row groups {rows:,}")
    _refuse_two_files(file, facts)
    file.seek(0)
    stored: set[str] = set()
    for group in range(facts.num_row_groups):
        for place in range(facts.num_columns):
            column = facts.row_group(group).column(place)
            if column.physical_type == "BYTE_ARRAY" and any("DICTIONARY" in name for name in column.encodings):
                stored.add(column.path_in_schema)
    return pyarrow.parquet.ParquetFile(file, read_dictionary=sorted(stored), page_checksum_verification=True)


def _refuse_two_files(file: Any, facts: Any) -> None:
    """Raise pyarrow.ArrowInvalid if the file is a Parquet file with another one behind it, whose description would be
    used for the data of the first.

    The first file is not longer than the gap between the data and the description; only that much is searched.
    """
    size = file.seek(0, 2)
    data_end = 4
    for group in range(facts.num_row_groups):
        for place in range(facts.num_columns):
            column = facts.row_group(group).column(place)
            first = min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)
            data_end = max(data_end, first + column.total_compressed_size)
    gap = size - 8 - facts.serialized_size - data_end
    if gap < len(_TWO_FILES):
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        end = min(size, gap + len(_TWO_FILES))
        at = view.find(_TWO_FILES, 0, end)
        while at >= 0 and not _ends_parquet(view, at):
            at = view.find(_TWO_FILES, at + 1, end)
        if at >= 0:
            raise pyarrow.ArrowInvalid(f"it is two Parquet files, of which the second begins at byte {at + 4:,}")


def _ends_parquet(view: Any, at: int) -> bool:
    """Return whether a Parquet file ends with the four bytes at `at`: whether its description is before them. Texts
    may hold these bytes too."""
    length = int.from_bytes(view[max(0, at - 4) : at], "little")
    if not 0 < length <= at - 8:
        return False
    try:
        pyarrow.parquet.read_metadata(pyarrow.BufferReader(b"PAR1" + view[at - 4 - length : at + 4]))
    except (OSError, ValueError):  # pyarrow.ArrowInvalid is a ValueError
        return False
    return True


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
