"""Which files a corpus is made of, and in which shapes: nothing is read twice, or left out, without a word."""

from __future__ import annotations

import gzip
import json
import os
import struct
from pathlib import Path

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from cloze.config import SourceConfig
from cloze.data.corpus import arrow_columns, content
from cloze.data.corpus.content import content_digest, describe_contents
from cloze.data.corpus.local_files import find_local, local_splits
from cloze.data.corpus.sources import open_corpus
from cloze.errors import DataError
from cloze.utils.foreign import arrow_batches
from cloze.utils.foreign.text_lines import read_lines

TEXTS = [f"Text number {number} of some." for number in range(60)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


def texts_of(name: Path | str, **more: str) -> list[str]:
    return [document.text for document in open_corpus(SourceConfig(dataset_name=str(name), **more)).documents()]


def refused(name: Path | str, **more: str) -> str:
    with pytest.raises(DataError) as caught:
        texts_of(name, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def put(path: Path, text: str = LINES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


PACKED = gzip.compress(b"x" * 99, mtime=0)
PACKED_TWICE = gzip.compress(PACKED, mtime=0)

SPLIT_FILES = [
    ["train.jsonl", "val.jsonl"],
    ["train.jsonl", "eval.jsonl"],
    ["training.jsonl", "evaluation.jsonl", "testing.jsonl"],
    ["my-train-1.jsonl", "my-dev-1.jsonl", "my_test_2.jsonl"],
    ["train/a.jsonl", "valid/a.jsonl", "deep/test/x/a.jsonl"],
    ["train/a.jsonl", "x-validation-y/a.jsonl"],
    ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test_asks-00000-of-00001.jsonl"],
    ["train.jsonl", "extra.jsonl"],
    ["trainer.jsonl", "evaluator.jsonl", "latest.jsonl"],
]


@pytest.mark.parametrize("names", SPLIT_FILES, ids=lambda names: names[-1])
def test_splits_by_name_are_those_of_datasets(tmp_path: Path, names: list[str]):
    for name in names:
        put(tmp_path / name, json.dumps({"text": name}) + "\n")
    theirs = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / ".cache"))
    ours = {split: sorted(texts_of(tmp_path, split=split)) for split in local_splits(str(tmp_path))}
    assert ours == {str(split): sorted(rows["text"]) for split, rows in theirs.items()}


def test_held_out_text_is_never_training_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("TRAIN.jsonl", "VAL.jsonl", "dev-of-train.jsonl"):
        put(tmp_path / "a" / name)
    assert {split: [path.name for path in files] for split, files in local_splits(str(tmp_path / "a")).items()} == {
        "train": ["TRAIN.jsonl"],
        "validation": ["VAL.jsonl", "dev-of-train.jsonl"],
    }
    put(tmp_path / "b" / "corpus.jsonl"), put(tmp_path / "b" / "val.jsonl")
    assert texts_of(tmp_path / "b") == TEXTS
    assert "train: 1 file (corpus.jsonl); also there: validation: 1 file (val.jsonl)" in capsys.readouterr().out
    put(tmp_path / "c" / "test.jsonl")
    assert "no split 'train'; the splits are: test; choose one with --split" in refused(tmp_path / "c")
    assert texts_of(tmp_path / "c" / "test.jsonl") == TEXTS
    assert "is named after the split test; it is read as train, because it was named" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "unclear"),
    [
        (["mytrain.jsonl", "myval.jsonl"], "myval.jsonl"),
        (["xtrain.jsonl", "xdev.jsonl.gz", "xtest.jsonl"], "xdev.jsonl.gz, xtest.jsonl"),
        (["wiki.jsonl", "wikivalid.jsonl"], "wikivalid.jsonl"),
        (["trainset/a.jsonl", "valset/b.jsonl"], "b.jsonl"),
        (["corpusTrain.jsonl", "corpusEval.jsonl"], "corpusEval.jsonl"),
        (["latest.jsonl", "intervals.jsonl", "values.jsonl", "device.jsonl", "trainers.jsonl"], None),
        (["train.jsonl", "myval.jsonl"], None),  # which is said to be left out
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_names_that_hide_another_split_are_named(tmp_path: Path, names: list[str], unclear: str | None):
    for name in names:
        put(tmp_path / name)
    notes = [note for note in find_local(str(tmp_path)).notes if note.startswith("read as train: ")]
    assert notes == ([f"read as train: {unclear}; {HINT}"] if unclear else [])


HINT = "if it is another split, write its name with a separator, as in my-val.jsonl"


def test_hidden_files_metadata_and_caches_are_no_data(tmp_path: Path):
    put(tmp_path / "clone" / "data" / "corpus.jsonl")
    for name in (
        ".ipynb_checkpoints/corpus-checkpoint.jsonl",
        ".git/x.txt",
        "__MACOSX/y.jsonl",
        ".hidden.jsonl",
        "dataset_infos.json",
        "README.md",
    ):
        put(tmp_path / "clone" / name)
    assert texts_of(tmp_path / "clone") == texts_of(tmp_path / "clone" / "**" / "*.json*") == TEXTS
    saved = datasets.Dataset.from_dict({"text": TEXTS})
    saved.save_to_disk(tmp_path / "saved")
    datasets.load_from_disk(tmp_path / "saved").map(lambda row: {"text": row["text"].upper()})
    datasets.load_from_disk(tmp_path / "saved").filter(lambda row: "7" in row["text"])
    assert len(list((tmp_path / "saved").glob("*.arrow"))) == 3
    assert texts_of(tmp_path / "saved") == texts_of(tmp_path / "saved" / "*.arrow") == TEXTS
    (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
    assert "lists data-00000-of-00001.arrow, which is missing" in refused(tmp_path / "saved")


def test_packed_files_that_are_not_read_are_named(tmp_path: Path):
    put(tmp_path / "a.jsonl")
    for name in ("b.jsonl.xz", "c.jsonl.gz.gz", "d.tar"):
        put(tmp_path / name)
    note = "not read: b.jsonl.xz, c.jsonl.gz.gz, d.tar; unpack what belongs to the corpus"
    assert note in find_local(str(tmp_path)).notes
    (tmp_path / "a.jsonl").unlink()
    assert "no files that Cloze reads; unpack b.jsonl.xz, c.jsonl.gz.gz, d.tar" in refused(tmp_path)


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


def test_joined_files_of_arrow_are_refused(tmp_path: Path):
    table = pyarrow.table({"text": TEXTS})
    with pyarrow.ipc.new_file(str(tmp_path / "c.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    assert texts_of(tmp_path / "c.arrow") == TEXTS
    (tmp_path / "c.arrow").write_bytes((tmp_path / "c.arrow").read_bytes() * 2)
    assert "and other bytes follow" in refused(tmp_path / "c.arrow")


def test_links_are_followed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    put(tmp_path / "disk" / "part" / "more.jsonl", '{"text": "more"}\n')
    put(tmp_path / "loop" / "corpus.jsonl")
    for name, target in {"again.jsonl": "corpus.jsonl", "a": ".", "b": "..", "c": "../loop", "d": "../disk"}.items():
        (tmp_path / "loop" / name).symlink_to(target)
    for deep in range(6):  # without a record of what was visited, 4^40 paths
        put(tmp_path / "loop" / "x" / str(deep) / "y.txt", "y\n")
        (tmp_path / "loop" / "x" / str(deep) / "up").symlink_to("../..")
    assert sorted(texts_of(tmp_path / "loop" / "**" / "*.jsonl")) == sorted([*TEXTS, "more"])
    assert sorted(texts_of(tmp_path / "loop")) == sorted([*TEXTS, "more", *"yyyyyy"])
    assert "again.jsonl is the same file as" in capsys.readouterr().err
    (tmp_path / "loop" / "lost.jsonl").symlink_to("nowhere.jsonl")
    assert "lost.jsonl: a link that leads nowhere" in refused(tmp_path / "loop")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put(tmp_path / "corpus.jsonl"), put(tmp_path / "locked" / "more.jsonl")
    (tmp_path / "locked").chmod(0)
    if os.access(tmp_path / "locked", os.R_OK):
        monkeypatch.setattr("cloze.data.corpus.find_files.MAX_ENTRIES", 1)
        assert "more than 1 files and folders" in refused(tmp_path)
    else:
        assert "locked: cannot be listed" in refused(tmp_path)


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


def test_zstd_of_long_windows_and_many_frames_is_read(tmp_path: Path):
    long = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    raw = LINES.encode()
    packed = zstandard.ZstdCompressor(compression_params=long).compressobj()
    (tmp_path / "long.jsonl.zst").write_bytes(packed.compress(raw) + packed.flush())
    (tmp_path / "many.jsonl.zst").write_bytes(zstandard.compress(raw[:1000]) + zstandard.compress(raw[1000:]))
    assert texts_of(tmp_path / "long.jsonl.zst") == texts_of(tmp_path / "many.jsonl.zst") == TEXTS


ENCODED = {
    "utf-8 mark": b"\xef\xbb\xbf" + LINES.encode(),
    "utf-16-le": b"\xff\xfe" + LINES.replace("\n", "\r\n").encode("utf-16-le"),
    "utf-16-be": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "utf-32": LINES.encode("utf-32"),
    "cr": LINES.replace("\n", "\r").encode(),
    "crlf": LINES.replace("\n", "\r\n").encode(),
    "mixed": LINES.encode().replace(b"\n", b"\r\n", 7)[::-1].replace(b"\n", b"\r", 3)[::-1],
    "appended": b"\xef\xbb\xbf" + LINES[:1800].encode()[: LINES[:1800].rfind("\n") + 1]
    + b"\xef\xbb\xbf" + LINES[LINES[:1800].rfind("\n") + 1 :].encode(),
}  # fmt: skip


@pytest.mark.parametrize("encoded", ENCODED.values(), ids=ENCODED)
@pytest.mark.parametrize("kind", ["jsonl", "txt", "csv"])
def test_encodings_and_line_ends_are_treated_alike(tmp_path: Path, encoded: bytes, kind: str):
    lines = encoded
    if kind != "jsonl":
        for codec in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le"):
            lines = lines.replace('{"text": "'.encode(codec), b"").replace('"}'.encode(codec), b"")
    path = tmp_path / f"c.{kind}"
    if kind == "csv":
        if encoded is ENCODED["appended"]:
            return
        head = next(
            mark
            for mark in (b"\xef\xbb\xbf", b"\xff\xfe\0\0", b"\xff\xfe", b"\xfe\xff", b"")
            if lines.startswith(mark)
        )
        codec = {b"\xff\xfe\0\0": "utf-32-le", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}.get(head, "utf-8")
        lines = head + "text\n".encode(codec) + lines.removeprefix(head)
    path.write_bytes(lines)
    corpus = open_corpus(SourceConfig(dataset_name=str(path)), unit_bytes=500)
    assert [document.text for document in corpus.documents()] == TEXTS
    if kind == "txt":
        assert read_lines(path) == TEXTS


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("c.txt", LINES.encode("utf-16-le"), "is UTF-16LE text without a byte-order mark; convert it into UTF-8"),
        ("c.jsonl", LINES.encode("utf-16-be"), "is UTF-16BE text without a byte-order mark"),
        ("c.csv", LINES.encode("utf-32-le"), "is UTF-32LE text without"),
        ("c.txt", "ไทย ภาษา\n".encode("utf-16-le") * 50, "is UTF-16LE text without"),
        ("c.txt", bytes(range(256)) * 9 + b"\0" * 99, "is binary data, not text"),
        ("c.txt", b"\x1f\x8b\x08" + b"x" * 99, "is gzip data, not text; add .gz to its name"),
        ("c.txt.gz", PACKED_TWICE, "holds gzip data, not text; it is packed twice"),
        ("c.txt", b"name".ljust(257, b"\0") + b"ustar\0", "is a tar archive, not text; unpack it"),
        ("c.txt.gz.gz", PACKED, "is packed twice; unpack it once"),
        ("c.txt.zst", PACKED, "it is gzip data: name it .gz"),
        ("c.txt.gz", zstandard.compress(b"x" * 99), "it is zstd data: name it .zst"),
        ("c.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS, not text"),
        ("c.txt", b"fine\nnot \0 fine\n", "line 2: NUL characters in the text"),
        ("c.txt", b"fine\ncaf\xe9\n", "line 2: invalid UTF-8; convert the file into UTF-8"),
    ],
)  # fmt: skip
def test_what_is_no_unicode_text_is_named(tmp_path: Path, name: str, raw: bytes, expected: str):
    (tmp_path / name).write_bytes(raw)
    assert expected in refused(tmp_path / name)
    with pytest.raises(DataError):
        read_lines(tmp_path / name)


def test_sentences_are_cut_at_the_ends_of_lines_only(tmp_path: Path):
    (tmp_path / "s.txt").write_bytes("\ufeffone\u2028and\x85more\r\n\r\n two \rthree".encode())
    assert read_lines(tmp_path / "s.txt") == ["one\u2028and\x85more", "two", "three"]


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


ROWS = [f"{number},{text}\n" for number, text in enumerate(TEXTS)]
BAD_CSV = {
    "to the end": ('7,"never closed\n', "record 31 (line 32): the quote that opens here is not closed properly"),
    "to the next quote": (
        '7,"never closed\n8,"closed"\n',
        "record 31 (line 32): the quote that opens here is not closed properly",
    ),
    "inside": ('7,"He said "hi" to me"\n', "record 31: not CSV"),
    "too many": ("7,Hello, world\n", "record 31: 3 fields, but the header has 2"),
    "too few": ("7\n", "record 31: 1 fields, but the header has 2"),
}


@pytest.mark.parametrize(("row", "expected"), BAD_CSV.values(), ids=BAD_CSV)
def test_a_broken_row_of_csv_is_named(tmp_path: Path, row: str, expected: str):
    put(tmp_path / "c.csv", "id,text\n" + "".join(ROWS[:30]) + row + "".join(ROWS[30:]))
    assert expected in refused(tmp_path / "c.csv")


PROSE = ["Why, oh why?\n\nBecause.", "One line,\nand one more,\nof prose", "No separators\nin these\nlines of text"]


def table(width: int, separator: str, texts: list[str]) -> str:
    """A file of rows `n, tag, ..., text` whose last column is not quoted."""
    names = ["id", *(f"tag{number}" for number in range(width - 2)), "text"]
    rows = [names, *([str(number), *["x"] * (width - 2), text] for number, text in enumerate(texts))]
    return "".join(separator.join(row[-width:]) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("suffix", "width", "last"),
    [("csv", 2, 30), ("csv", 2, 12), ("csv", 4, 11), ("tsv", 2, 11), ("tsv", 5, 30)],
    ids=["many rows", "two rows", "one row of four fields", "one row of tabs", "many rows of tabs"],
)
def test_two_stray_quotes_do_not_swallow_rows(tmp_path: Path, suffix: str, width: int, last: int):
    texts = [*TEXTS]
    texts[10], texts[last] = f'"{texts[10]}', f'{texts[last]}"'
    put(tmp_path / f"c.{suffix}", table(width, "\t" if suffix == "tsv" else ",", texts))
    assert "record 11: a quoted field takes in lines that look like rows" in refused(tmp_path / f"c.{suffix}")


def test_stray_quotes_may_stand_in_any_column_and_in_the_header(tmp_path: Path):
    rows = table(2, ",", TEXTS).splitlines(keepends=True)
    rows[11], rows[31] = f'"{rows[11]}', rows[31].replace(",", '",')
    put(tmp_path / "c.csv", "\r\n".join(row.strip() for row in rows))
    assert "record 11: a quoted field takes in lines that look like rows" in refused(tmp_path / "c.csv")
    put(tmp_path / "d.csv", 'text,"id\n' + "".join(f"{text},7\n" for text in TEXTS[:5]) + 'x,7"\ny,8\n')
    assert "a quoted field of the header takes in lines" in refused(tmp_path / "d.csv")


@pytest.mark.parametrize("width", [1, 2, 3])
def test_texts_of_several_lines_are_no_stray_quotes(tmp_path: Path, width: int, capsys: pytest.CaptureFixture[str]):
    texts = [*TEXTS, *(f'"{text}"' for text in PROSE)]
    put(tmp_path / "c.csv", table(width, ",", texts))
    assert texts_of(tmp_path / "c.csv") == [*TEXTS, *PROSE]
    assert "warning" not in capsys.readouterr().err


def test_the_only_long_row_of_a_single_column_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    texts = [*TEXTS]
    texts[10], texts[30] = f'"{texts[10]}', f'{texts[30]}"'
    put(tmp_path / "c.csv", table(1, ",", texts))
    assert len(texts_of(tmp_path / "c.csv")) == 40
    assert "c.csv, record 11 (line 12) is a quoted text of 21 lines" in capsys.readouterr().err


def test_the_separator_of_csv_is_not_guessed(tmp_path: Path):
    put(tmp_path / "c.tsv", "id\ttext\n1\tone, two\n")
    assert texts_of(tmp_path / "c.tsv") == ["one, two"]
    put(tmp_path / "c.csv", "id;text\n1;one, two\n")
    assert "its columns are separated by semicolons" in refused(tmp_path / "c.csv")
    put(tmp_path / "d.csv", "text,text\n1,2\n")
    assert "has 2 columns 'text'" in refused(tmp_path / "d.csv")


def test_a_table_of_very_many_columns_costs_no_more_than_its_bytes(tmp_path: Path):
    names = ",".join(f"c{number}" for number in range(300_000))
    put(tmp_path / "c.csv", f"{names},text\n" + "," * 300_000 + "words\n")
    assert texts_of(tmp_path / "c.csv") == ["words"]
    assert len(refused(tmp_path / "c.csv", text_field="body")) < 1000


def test_identity_is_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLOZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "PART_BYTES", 2**20)
    monkeypatch.setattr(content, "SETTLED_SECONDS", -1.0)
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"x" * (5 * 2**20 + 3))
    first = describe_contents([path], identify=True)[0]
    read: list[int] = []
    whole = content._part_digest
    monkeypatch.setattr(content, "_part_digest", lambda *place: read.append(place[1]) or whole(*place))
    assert content_digest(path) == first["content"]
    assert read == [], "an unchanged file is not read again"
    times = path.stat().st_mtime_ns, path.stat().st_mtime_ns
    for place in (2**20 + 17, 5 * 2**20 + 2):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"R")
        os.utime(path, ns=times)  # as a tool does that hides its traces; ctime cannot be set
        changed = describe_contents([path], identify=True)[0]
        assert changed["content"] != first["content"]
        assert changed["bytes"] == first["bytes"]
        first = changed
    monkeypatch.setenv("CLOZE_CACHE", "/proc/nowhere")
    assert content_digest(path) == first["content"], "without a cache it is computed"


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
    monkeypatch.setattr("cloze.data.corpus.readers.MAX_RECORD_BYTES", 15_000)
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


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_file_that_is_not_packed_as_its_name_says_is_told_how_to_name_it(tmp_path: Path, packing: str):
    assert f"remove {packing} from its name" in refused(put(tmp_path / f"x.jsonl{packing}"))
