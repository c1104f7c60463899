"""Files are read in pieces of any size: no record is lost, doubled, or moved, and a bad one is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloze.config import PrepareConfig, SourceConfig
from cloze.data.corpus import arrow_columns, formats, json_array
from cloze.data.corpus.content import PART_BYTES, digest
from cloze.data.corpus.fields import BadRecord, Document, Fields, hash_of
from cloze.data.corpus.formats import Piece
from cloze.data.corpus.jsonl import parse_line
from cloze.data.corpus.presets import PRESETS, with_preset
from cloze.data.corpus.readers import pieces_of, place_of, read_piece
from cloze.data.corpus.sources import document_of, open_corpus
from cloze.errors import DataError

FIELDS = Fields.parse("text", None)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


def read(path: Path, size: int) -> list:
    """Every record of a file through pieces of `size`, as documents; bad ones as their reasons."""
    found = []
    for piece in pieces_of(path, size):
        for _, raw in read_piece(piece, FIELDS):
            try:
                found.append(document_of(raw, FIELDS))
            except BadRecord as error:
                found.append(str(error))
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(TEXT, max_size=12),
    st.integers(1, 200),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
    st.booleans(),
    st.booleans(),
)
def test_lines_are_read_once_whatever_the_pieces(
    tmp_path: Path, texts: list[str], size: int, newline: str, final: bool, bom: bool
):
    lines = [json.dumps({"id": str(number), "text": text}) for number, text in enumerate(texts)]
    content = newline.join(lines) + (newline if final else "")
    (tmp_path / "c.jsonl").write_bytes((b"\xef\xbb\xbf" if bom else b"") + content.encode())
    assert read(tmp_path / "c.jsonl", size) == [Document(str(n), text) for n, text in enumerate(texts)]


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_text_files_keep_their_lines(tmp_path: Path, size: int):
    lines = ["one", "", "two  three ", "ünï", "x" * 100, "end"]
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [document.text for document in read(tmp_path / "c.txt", size)] == lines


@pytest.mark.parametrize("size", [1, 100, 1000, 10**6])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "file"])
def test_tables_are_read_once_whatever_the_pieces(tmp_path: Path, kind: str, size: int):
    rows = [{"q_id": f"q{i}", "text": "word " * (i % 7)} for i in range(50)]
    table = pyarrow.Table.from_pylist(rows)
    path = tmp_path / ("c.parquet" if kind == "parquet" else "c.arrow")
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    else:
        make = pyarrow.ipc.new_stream if kind == "arrow" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    assert read(path, size) == [Document(row["q_id"], row["text"]) for row in rows]
    positions = [position for piece in pieces_of(path, size) for position, _ in read_piece(piece, FIELDS)]
    assert positions == list(range(50))
    assert len(pieces_of(path, 1)) == 17


@pytest.mark.parametrize("size", [1, 50, 333, 10_000])
def test_a_place_in_a_piece_is_put_into_a_line_number(tmp_path: Path, size: int):
    (tmp_path / "c.jsonl").write_text("".join('{"text": "' + "x" * (n * 13 % 40) + '"}\n' for n in range(60)))
    places = [
        place_of(piece, position)
        for piece in pieces_of(tmp_path / "c.jsonl", size)
        for position, _ in read_piece(piece, FIELDS)
    ]
    assert places == [f"{tmp_path / 'c.jsonl'}, line {number}" for number in range(1, 61)]


BAD = [
    (b'{"text": null}', "null text"),
    (b'{"title": "x"}', "no field 'text'"),
    (b'{"text": 3}', "field 'text' is int, not text"),
    (b'{"text": {"a": "b"}}', "field 'text' is dict, not text"),
    (b'{"text": [true]}', "field 'text' is bool, not text"),
    (b'{"text": "caf\xe9"}', "invalid UTF-8"),
    (b'{"text": "a"', "not JSON"),
    (b"[1]", "not a JSON object"),
    (b'{"text": "a\\u0000b"}', "NUL characters in the text"),
    (b'{"text": ' + b"[" * 500 + b'"a"' + b"]" * 500 + b"}", "field 'text' has lists nested more than 16 deep"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": "' + b"x" * 300 + b'"}', "larger than 0 MiB"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason for _, reason in BAD])
@pytest.mark.parametrize("size", [40, 10**6])
def test_a_bad_line_is_a_reason_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, reason: str, size: int
):
    limit = 200 if reason.startswith("larger") else 10**6
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", limit)
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    before, bad, after = read(tmp_path / "c.jsonl", size)
    assert (before.text, after.text) == ("before", "after")
    assert bad.startswith(reason)


def test_what_only_the_patient_parser_reads_is_read():
    assert parse_line(rb'{"text": "a\ud83d\ude00b"}')["text"] == "a😀b"
    assert parse_line(rb'{"text": "a\ud800b", "\udfff": [1]}') == {"text": "a\ufffdb", "\ufffd": [1]}
    assert parse_line(b'{"text": "a", "n": 123456789012345678901234567890}')["text"] == "a"
    assert parse_line(b'{"text": "a", "n": NaN}')["text"] == "a"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(VALUES, max_size=6), st.integers(1, 40), st.sampled_from([None, 1, 4]), st.booleans())
def test_an_array_is_what_json_says_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list, step: int, indent: int | None, ascii_only: bool
):
    monkeypatch.setattr(json_array, "_READ", step)
    (tmp_path / "c.json").write_text(" \n" + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + "\n ")
    with open(tmp_path / "c.json", "rb") as file:
        found = list(json_array.read_array(file, "c.json", 10**6))
    assert [number for number, _ in found] == list(range(1, len(values) + 1))
    for (_, record), value in zip(found, values, strict=True):
        if isinstance(value, dict):
            assert record == value
        else:
            assert str(record) == "not a JSON object"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"text": "a"}, {"text": "b"', "record 2: not JSON"),
        (b'[{"text": "a"} {"text": "b"}]', "record 1: not JSON (no comma after it)"),
        (b'[{"text": "a"}', "record 1: not JSON (the file ends here)"),
        (b'[{"text": "a"}] x', "record 1: not JSON (text after the end of the array)"),
        (b'[{"text": "a"},]', "record 2: not JSON"),
        (b"[", "record 1: not JSON"),
    ],
)
def test_a_broken_array_is_refused(tmp_path: Path, content: bytes, expected: str):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / "c.json", 100)
    assert expected in str(caught.value)


def test_bad_records_of_arrays_and_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 100)
    big = b"x" * 150
    (tmp_path / "c.json").write_bytes(b'[{"text": "a"}, 7, {"text": "\xff"}, {"text": "' + big + b'"}, {"text": "b"}]')
    found = read(tmp_path / "c.json", 1000)
    assert found[0].text == "a"
    assert found[1:4] == ["not a JSON object", "invalid UTF-8", "larger than 0 MiB"]
    assert found[4].text == "b"
    (tmp_path / "c.csv").write_bytes(b'text,id\n"one, two",1\n\xff,2\n"a\nb",3\n')
    assert read(tmp_path / "c.csv", 1000) == [Document("1", "one, two"), "invalid UTF-8", Document("3", "a\nb")]


def test_a_table_inside_a_packed_file_is_refused(tmp_path: Path):
    (tmp_path / "c.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(DataError, match=r"c.parquet.gz: .*twice"):
        pieces_of(tmp_path / "c.parquet.gz", 1000)


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "q_id": st.none() | st.sampled_from(["", "q1", "q2"]),
            "answers": st.none() | st.fixed_dictionaries({"text": st.none() | st.lists(st.none() | TEXT, max_size=3)}),
            "title": st.none() | TEXT,
        }
    ),
    min_size=1,
    max_size=8,
)


@given(ROWS, st.sampled_from(["answers.text", "title", "title,answers.text"]))
def test_columns_give_the_documents_that_rows_give(rows: list[dict], field: str):
    schema = pyarrow.schema(
        [
            ("q_id", pyarrow.string()),
            ("answers", pyarrow.struct([("text", pyarrow.list_(pyarrow.string()))])),
            ("title", pyarrow.string()),
        ]
    )
    fields = Fields.parse(field, None)
    batch = pyarrow.RecordBatch.from_pylist(rows, schema=schema)

    def of(raw) -> Document | str:
        try:
            return document_of(raw, fields)
        except BadRecord as error:
            return str(error)

    assert [of(raw) for _, raw in arrow_columns.documents(batch, fields, 0)] == [of(row) for row in rows]


SHAPES = {
    "eli5": {"q_id": "5ld1qa", "title": "Why?", "selftext": "Tell.", "answers": {"text": ["So.", "Hence."]}, "x": 1},
    "eli5_category": {"q_id": "5ld1qa", "title": "Why?", "selftext": "Tell.", "answers": {"text": ["So.", "Hence."]}},
    "eli5_kilt": {
        "id": "5ld1qa",
        "input": "Why? Tell.",
        "output": [{"answer": "So."}, {"provenance": []}, {"answer": None}, {"answer": "Hence."}],
    },
    "eli5_pairs": {"question": "Why? Tell.", "answer": "So. Hence."},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_knows_the_fields_of_its_corpus(name: str, tmp_path: Path):
    (tmp_path / "c.jsonl").write_text(json.dumps(SHAPES[name]) + "\n")
    for choice, text in (("answers", "So. Hence."), ("full", "Why? Tell. So. Hence.")):
        config = PrepareConfig(
            preset=name, document=choice, dataset_name=str(tmp_path / "c.jsonl"), tokenizer_name="", output=""
        )
        (document,) = open_corpus(config).documents()
        assert document.text == text
        assert document.id == ("5ld1qa" if name != "eli5_pairs" else hash_of(text))
    alone = with_preset(SourceConfig(preset=name))
    assert alone.dataset_name == PRESETS[name].dataset_name
    assert with_preset(SourceConfig(preset=name, text_field="title")).text_field == "title"


def test_tasks_depend_on_the_files_and_the_unit_size_alone(tmp_path: Path):
    for number in range(30):
        (tmp_path / f"small-{number:02d}.jsonl").write_text('{"text": "x"}\n' * 10)
    (tmp_path / "large.jsonl").write_text('{"text": "y"}\n' * 1000)
    (tmp_path / "large.json").write_text(json.dumps([{"text": "z"}] * 1000))
    corpus = open_corpus(SourceConfig(dataset_name=str(tmp_path)), unit_bytes=2000)
    again = open_corpus(SourceConfig(dataset_name=str(tmp_path)), unit_bytes=2000)
    assert [(task.number, task.pieces) for task in corpus.tasks] == [
        (task.number, task.pieces) for task in again.tasks
    ]
    assert sum(task.stream is not None for task in corpus.tasks) == 1
    assert max(sum(piece.size for piece in task.pieces) for task in corpus.tasks) <= 2000
    assert sum(len(task.pieces) > 1 for task in corpus.tasks) >= 2, "small files are put together"
    assert sum(1 for _ in corpus.documents()) == 30 * 10 + 2000


def test_a_digest_notices_a_changed_byte(tmp_path: Path):
    path = tmp_path / "c"
    path.write_bytes(bytes(1000))
    before = digest(path)
    path.write_bytes(bytes(500) + b"\x01" + bytes(499))
    assert digest(path) != before
    with open(path, "wb") as file:
        file.truncate(PART_BYTES + 1000)
    before = digest(path)
    assert before.startswith("sampled-sha256:")
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert digest(path) != before


def test_a_line_longer_than_its_piece_is_whole(tmp_path: Path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "x" * 5000}) + '\n{"text": "y"}\n')
    pieces = pieces_of(tmp_path / "c.jsonl", 100)
    assert len(pieces) == 51
    assert [len([*read_piece(piece, FIELDS)]) for piece in pieces] == [1] + [0] * 49 + [1]
    assert [*read_piece(Piece(str(tmp_path / "c.jsonl"), 0, None, 0), FIELDS)][1][0] == 2


def test_a_lone_surrogate_in_an_array_is_replaced(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text('[{"text": "a \\ud83d", "x\\ude00": 1}, {"text": "\\ud83d\\ude00"}]')
    assert [document.text for document in read(path, 1000)] == ["a \ufffd", "\U0001f600"]
