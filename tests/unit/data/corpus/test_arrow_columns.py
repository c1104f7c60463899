"""Columns of Arrow and Parquet: nested and dictionaries too; files that contradict themselves are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from corpus_files import TEXTS, refused, texts_of

from cloze.config import SourceConfig
from cloze.data.corpus import arrow_columns
from cloze.data.corpus.sources import open_corpus
from cloze.utils.foreign import arrow_batches


def test_joined_files_of_arrow_are_refused(tmp_path: Path):
    table = pyarrow.table({"text": TEXTS})
    with pyarrow.ipc.new_file(str(tmp_path / "c.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    assert texts_of(tmp_path / "c.arrow") == TEXTS
    (tmp_path / "c.arrow").write_bytes((tmp_path / "c.arrow").read_bytes() * 2)
    assert "and other bytes follow" in refused(tmp_path / "c.arrow")


def put_arrow(path: Path, column: pyarrow.Array) -> None:
    batch = pyarrow.record_batch([column], ["text"])
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)


@pytest.mark.parametrize("offsets", [(0, 2**30, 2**30 + 4), (0, 4, 2), (-7, 2, 4), (0, 2, 2**31 - 1)])
def test_offsets_that_point_elsewhere_are_refused(tmp_path: Path, offsets: tuple[int, int, int]):
    """Not validated, they read other memory, or end the process."""
    path = tmp_path / "c.arrow"
    put_arrow(path, pyarrow.array(["ab", "cd"]))
    assert texts_of(path) == ["ab", "cd"]
    held = path.read_bytes()
    place = held.index(struct.pack("<3i", 0, 2, 4))
    path.write_bytes(held[:place] + struct.pack("<3i", *offsets) + held[place + 12 :])
    assert "cannot be read" in refused(path)


def test_a_bad_string_of_arrow_is_a_bad_record(tmp_path: Path):
    put_arrow(tmp_path / "c.arrow", pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string()))
    assert "row 1: invalid UTF-8" in refused(tmp_path / "c.arrow")


@pytest.mark.parametrize("nested", [False, True])
def test_a_dictionary_of_parquet_is_decoded_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool):
    """A few hundred bytes stand for 400 MB: no batch holds more than BATCH_BYTES of it."""
    numbers = pyarrow.array([0, 1] * 10_000, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(numbers, pyarrow.array(["x" * 20_000, "y" * 20_000]))
    if nested:
        column = pyarrow.ListArray.from_arrays(pyarrow.array(range(20_001), pyarrow.int32()), column)
    path = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, store_schema=False, compression="zstd")
    assert path.stat().st_size < 100_000
    held: list[int] = []
    plain = arrow_columns.documents
    monkeypatch.setattr(
        arrow_columns, "documents", lambda batch, *more: held.append(batch.nbytes) or plain(batch, *more)
    )
    seen = sum(1 for _ in open_corpus(SourceConfig(dataset_name=str(path))).documents())
    assert seen == 20_000
    assert max(held) < 1.1 * arrow_batches.BATCH_BYTES
    monkeypatch.setattr("cloze.data.corpus.formats.MAX_RECORD_BYTES", 15_000)
    monkeypatch.setattr(arrow_batches, "BATCH_BYTES", 10_000)
    assert "row 0: larger than" in refused(path)


@pytest.mark.parametrize("rows_per_group", [77, 5000])
def test_a_nested_column_of_many_row_groups_is_read(tmp_path: Path, rows_per_group: int):
    """Each row group has a dictionary of its own, and one that is full continues in plain values."""
    texts = [[f"answer {row} {place} " + "x" * (row % 400) for place in range(3)] for row in range(5000)]
    path = tmp_path / "c.parquet"
    table = pyarrow.table({"answers": [{"text": one} for one in texts]})
    pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)
    documents = open_corpus(SourceConfig(dataset_name=str(path), text_field="answers.text")).documents()
    assert [document.text for document in documents] == [" ".join(one) for one in texts]


def streamed(texts: list[str], end: bool = True) -> bytes:
    """Return an Arrow stream with a batch for each text."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, pyarrow.schema({"text": pyarrow.string()})) as writer:
        for text in texts:
            writer.write_batch(pyarrow.record_batch({"text": [text]}))
    content = sink.getvalue().to_pybytes()
    return content if end else content[:-8]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (streamed(["a", "b"], end=False), "without its end mark"),
        (streamed(["a", "b"], end=False) + bytes(500), "without its end mark"),
        (streamed(["a", "b"]) + streamed(["c"]), "and other bytes follow"),
    ],
    ids=["cut between messages", "zeros", "two streams"],
)
def test_an_arrow_stream_is_read_to_its_end_mark_or_refused(tmp_path: Path, content: bytes, expected: str):
    (tmp_path / "x.arrow").write_bytes(content)
    assert expected in refused(tmp_path / "x.arrow")


def test_an_arrow_stream_with_its_end_mark_is_read(tmp_path: Path):
    (tmp_path / "x.arrow").write_bytes(streamed(["a", "b"]))
    assert texts_of(tmp_path / "x.arrow") == ["a", "b"]


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (500, 3), (3, 500)])
def test_two_parquet_files_in_one_are_refused(tmp_path: Path, index: bool, sizes: tuple[int, int]):
    path, whole = tmp_path / "x.parquet", b""
    for size in sizes:
        texts = [f"PAR1PAR1 {number}" for number in range(size)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, write_page_index=index)
        assert texts_of(path) == texts
        whole += path.read_bytes()
    path.write_bytes(whole)
    assert "two Parquet files" in refused(path)


def test_a_parquet_page_with_a_wrong_checksum_is_refused(tmp_path: Path):
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": ["alpha", "beta"]})
    pyarrow.parquet.write_table(
        table, path, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    path.write_bytes(path.read_bytes().replace(b"beta", b"bexa", 1))
    assert "CRC checksum" in refused(path)


@pytest.mark.parametrize("page_bytes", [2**20, 60])
@pytest.mark.parametrize("values", [0, 4])
def test_a_parquet_page_that_says_fewer_values_than_it_holds_is_refused(tmp_path: Path, values: int, page_bytes: int):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [f"text number {number}" for number in range(20)]}),
        path,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        data_page_size=page_bytes,
        write_batch_size=5,
    )
    content = bytearray(path.read_bytes())
    in_page = 20 if page_bytes == 2**20 else 5
    at = content.index(bytes([0x2C, 0x15, 2 * in_page, 0x15, 0]))  # Thrift writes numbers doubled
    content[at + 2] = 2 * values
    path.write_bytes(content)
    assert "its description says 20" in refused(path)


@pytest.mark.parametrize(("place", "said"), [(0, "says 19 rows"), (-1, "of its row groups 19")])
def test_a_parquet_description_with_another_number_of_rows_is_refused(tmp_path: Path, place: int, said: str):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["alpha"] * 20}), path, write_statistics=False)
    content = path.read_bytes()
    places = [at for at in range(len(content)) if content[at : at + 2] == b"\x16\x28"]  # an i64 of 20
    at = places[place] + 1  # the first is of the file, the last of its row group
    path.write_bytes(content[:at] + b"\x26" + content[at + 1 :])
    assert said in refused(path)
