"""Fields of records of any shape: which are text, which are the id, and what is no document."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from corpus_files import TEXTS, put, refused, texts_of

from cloze.config import SourceConfig
from cloze.data.corpus.sources import open_corpus


def test_columns_with_one_name_or_spaces_in_it_are_named(tmp_path: Path):
    column = pyarrow.array(TEXTS)
    for names in (["text", "text"], ["text", "id", "id"]):
        table = pyarrow.Table.from_arrays([column] * len(names), names=names)
        pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
        with pyarrow.ipc.new_stream(str(tmp_path / "c.arrow"), table.schema) as writer:
            writer.write_table(table)
        for kind in ("parquet", "arrow"):
            assert f"has 2 columns '{names[-1]}'; give each its own name" in refused(tmp_path / f"c.{kind}")
    put(tmp_path / "c.csv", 'id, text,"a,b"\n' + "".join(f"{number}, {text},x\n" for number, text in enumerate(TEXTS)))
    assert "the fields are: id, ' text', 'a,b'" in (told := refused(tmp_path / "c.csv"))
    assert "rename a field with a comma in its name" in told
    assert texts_of(tmp_path / "c.csv", text_field=" text") == [f" {text}" for text in TEXTS]
    put(tmp_path / "d.csv", f'"{"x" * 10_000}",id\n1,2\n')
    assert len(refused(tmp_path / "d.csv")) < 300


FLAT = [
    {"q_id": f"q{number}", "answers.text": [text, "And more."], "title": "Why?"} for number, text in enumerate(TEXTS)
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "csv"])
def test_a_column_with_a_dot_in_its_name_is_reached(tmp_path: Path, kind: str):
    path = tmp_path / f"flat.{kind}"
    expected = [f"{text} And more." for text in TEXTS]
    table = pyarrow.Table.from_pylist(FLAT)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "arrow":
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    elif kind == "csv":
        put(path, "q_id,answers.text\n" + "".join(f"q{n},{text}\n" for n, text in enumerate(expected)))
    else:
        put(path, "".join(json.dumps(row) + "\n" for row in FLAT))
    assert texts_of(path, text_field="answers.text") == texts_of(path, preset="eli5_category") == expected
    if kind != "csv":
        full = texts_of(path, preset="eli5_category", text_field="title,answers.text")
        assert full == [f"Why? {text}" for text in expected]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_name_with_brackets_is_a_name_first(tmp_path: Path, kind: str):
    frame = pyarrow.Table.from_pylist([{"text[]": text, "text": "other", "x": "y"} for text in TEXTS])
    if kind == "parquet":
        pyarrow.parquet.write_table(frame, tmp_path / "c.parquet")
    elif kind == "csv":
        put(tmp_path / "c.csv", "text[],text,x\n" + "".join(f"{text},other,y\n" for text in TEXTS))
    else:
        put(tmp_path / "c.jsonl", "".join(json.dumps(row) + "\n" for row in frame.to_pylist()))
    assert texts_of(tmp_path / f"c.{kind}", text_field="text[]") == TEXTS
    assert texts_of(tmp_path / f"c.{kind}", text_field="x[]") == ["y"] * len(TEXTS)


def test_text_and_id_may_be_fields_of_one_column(tmp_path: Path):
    rows = [{"doc": {"text": text, "id": f"d{number}", "x": 1}} for number, text in enumerate(TEXTS)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    config = SourceConfig(dataset_name=str(tmp_path / "c.parquet"), text_field="doc.text", id_field="doc.id")
    assert [(one.id, one.text) for one in open_corpus(config).documents()] == [
        (row["doc"]["id"], row["doc"]["text"]) for row in rows
    ]


def test_the_literal_name_comes_before_the_path(tmp_path: Path):
    put(tmp_path / "c.jsonl", json.dumps({"a": {"b": "nested", "c.d": "inner"}, "a.b": "literal"}) + "\n")
    assert texts_of(tmp_path / "c.jsonl", text_field="a.b") == ["literal"]
    assert texts_of(tmp_path / "c.jsonl", text_field="a.c.d") == ["inner"]


RECORDS = [{"id": f"d{number}", "text": text} for number, text in enumerate(TEXTS)]
SHAPES = {
    "wrapped": (json.dumps({"version": "1", "data": RECORDS}), "one record that holds 60 others in its field 'data'"),
    "wrapped pretty": (json.dumps({"data": RECORDS}, indent=2), "one record that holds 60 others in its field 'data'"),
    "wrapped large": (
        json.dumps({"v": 1, "data": [*RECORDS, {"text": "x" * 2**21}]}),
        "one record that holds the others in its field 'data'",
    ),
    "one line": ("".join(map(json.dumps, RECORDS)), "several records on one line"),
    "pretty": ("\n".join(json.dumps(record, indent=1) for record in RECORDS), "records of several lines each"),
    "commas": ("".join(json.dumps(record) + ",\n" for record in RECORDS), "a comma after each record"),
    "columns": (json.dumps({"id": [*range(60)], "text": TEXTS}), "holds columns, not records"),
    "pandas": (json.dumps({"text": dict(enumerate(TEXTS))}), "holds columns, not records"),
    "by name": (json.dumps({f"d{n}": record for n, record in enumerate(RECORDS)}), "holds 60 others by name"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), SHAPES.values(), ids=SHAPES)
def test_records_in_another_shape_are_refused_with_a_way_out(tmp_path: Path, content: str, expected: str):
    put(tmp_path / "c.json", content)
    assert expected in refused(tmp_path / "c.json")
    if content.startswith('{"v'):
        assert "is a list of 6" in refused(tmp_path / "c.json", text_field="data.text")


PIECES = [{"text": text, "body": text} for text in TEXTS[:3]]
LISTS = {
    "deep": ({"result": {"items": PIECES}}, "result.items.text", '.["result"]["items"][]'),
    "two": ({"data": PIECES[:2]}, "data.text", '.["data"][]'),
    "in lists": ({"data": [{"title": "t", "parts": PIECES}]}, "data.parts.text", '.["data"][]["parts"][]'),
    "no text": ({"data": [{"body": text} for text in TEXTS]}, "data.body", '.["data"][]'),
    "strings": ({"text": TEXTS[:3]}, "text", '.["text"][] | {"text": .}'),
}


@pytest.mark.parametrize(("record", "field", "query"), LISTS.values(), ids=LISTS)
def test_a_list_in_the_only_record_is_no_document(tmp_path: Path, record: dict, field: str, query: str):
    for text in (json.dumps(record), json.dumps(record, indent=1), json.dumps([record])):
        put(tmp_path / "c.json", text)
        told = refused(tmp_path / "c.json", text_field=field)
        assert query in told or "jq -c . OLD" in told
        told = refused(tmp_path / "c.json", **({} if field != "text" else {"text_field": field}))
        assert f" {field};" not in told
        assert text[0] == "[" or query in told or "jq -c . OLD" in told


@pytest.mark.parametrize("kind", ["files", "lines", "parquet"])
def test_texts_joined_from_a_list_of_records_are_named_in_one_line(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
):
    record, tmp_path = {"result": {"items": PIECES}}, tmp_path / "corpus"
    tmp_path.mkdir()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record] * 2), tmp_path / "c.parquet")
    elif kind == "lines":
        put(tmp_path / "c.jsonl", (json.dumps(record) + "\n") * 2)
    else:
        put(tmp_path / "a.json", json.dumps(record)), put(tmp_path / "b.json", json.dumps(record))
    assert len(texts_of(tmp_path, text_field="result.items.text")) == 2
    told = capsys.readouterr().err
    assert told.count("warning") == 1
    assert "is a list of 3 texts, which become one document" in told
    assert "result.items (a list of records)" in refused(tmp_path, text_field="nothing")
    texts_of(tmp_path, text_field="result.items.text", preset="eli5_pairs")
    assert "warning" not in capsys.readouterr().err


def test_an_id_that_nobody_named_stops_nothing(tmp_path: Path):
    put(tmp_path / "c.jsonl", '{"id": {"$oid": "5f"}, "text": "a"}\n')
    assert texts_of(tmp_path / "c.jsonl") == ["a"]
    assert "field 'id' is dict, not a name" in refused(tmp_path / "c.jsonl", id_field="id")
