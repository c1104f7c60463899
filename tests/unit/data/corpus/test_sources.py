"""Any common file is a corpus: formats, compressions, nested fields, splits and slices."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from cloze.config import PrepareConfig
from cloze.data.corpus.fields import Fields
from cloze.data.corpus.local_files import is_local, local_splits
from cloze.data.corpus.sources import open_corpus
from cloze.errors import ConfigError, DataError

RECORDS = [{"q_id": f"q{i}", "text": f"Text number {i}, with ünïcode 🌌 and\ttabs."} for i in range(20)]

ZST_WITHOUT_SIZE = zstandard.ZstdCompressor(write_content_size=False).compress(json.dumps(RECORDS).encode() * 50)


def write(folder: Path, kind: str) -> Path:
    """RECORDS as a file of one kind."""
    path = folder / f"corpus.{kind}"
    base, _, packing = kind.partition(".")
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    content = {"json": json.dumps(RECORDS, indent=1).encode(), "lines": lines, "jsonl": lines, "ndjson": lines}.get(
        base
    )
    if base == "lines":
        path = folder / "corpus.json"
    if base == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["q_id", "text"])
            writer.writeheader()
            writer.writerows(RECORDS)
        return path
    table = pyarrow.Table.from_pylist(RECORDS)
    if base == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=7)
        return path
    if base in ("arrow", "feather"):
        path = folder / "corpus.arrow"
        make = pyarrow.ipc.new_stream if base == "arrow" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(table)
        return path
    assert content is not None
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress, "": bytes}[packing]
    path.write_bytes(pack(content))
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "json", "json.gz", "json.zst", "lines", "jsonl", "jsonl.gz", "jsonl.zst", "ndjson", "csv", "parquet", "arrow",
        "feather",
    ],
)  # fmt: skip
def test_every_format_gives_the_same_records(tmp_path: Path, kind: str):
    documents = list(source(write(tmp_path, kind)).documents())
    assert [document._asdict() for document in documents] == [{"id": r["q_id"], "text": r["text"]} for r in RECORDS]


def test_a_text_file_is_a_document_a_line(tmp_path: Path):
    (tmp_path / "corpus.txt").write_text("one\n\ntwo three\n")
    assert [document.text for document in source(tmp_path / "corpus.txt").documents()] == ["one", "", "two three"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("cut.jsonl.gz", gzip.compress(json.dumps(RECORDS).encode() * 50)[:-40], "cut.jsonl.gz: cannot be unpacked"),
        ("not.jsonl.gz", b"this is not gzip", "not.jsonl.gz: cannot be unpacked"),
        (
            "cut.json.zst",
            zstandard.compress(json.dumps(RECORDS).encode() * 50)[:-40],
            "cut.json.zst: cannot be unpacked",
        ),
        ("streamed.jsonl.zst", ZST_WITHOUT_SIZE[:-40], "streamed.jsonl.zst: cannot be unpacked"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "bad.jsonl, line 2: not JSON"),
        ("bad.json", b'[{"text": "a"},\n{"text" "b"}]', "bad.json, record 2: not JSON"),
        ("list.jsonl", b'{"text": "a"}\n[1]\n', "list.jsonl, line 2: not a JSON object"),
        ("latin.txt", "café".encode("latin-1"), "latin.txt, line 1: invalid UTF-8"),
        ("cut.parquet", b"PAR1 and then nothing", "cut.parquet: cannot be read"),
        ("cut.arrow", b"\xff\xff\xff\xff\x10\x00\x00\x00abc", "cut.arrow: cannot be read"),
        ("corpus.docx", b"", "corpus.docx: unknown file type"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, expected: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(source(tmp_path / name).documents())
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def source(name: Path | str, split: str = "train", **more: str):
    return open_corpus(PrepareConfig(dataset_name=str(name), tokenizer_name="", output="", split=split, **more))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(20)),
        ("train[:5]", range(5)),
        ("train[5:]", range(5, 20)),
        ("train[3:7]", range(3, 7)),
        ("train[10%:25%]", range(2, 5)),
        ("train[:-3]", range(17)),
        ("train[-3:]", range(17, 20)),
        ("train[:100]", range(20)),
    ],
)
def test_slices_are_those_of_datasets(tmp_path: Path, split: str, expected: range):
    documents = list(source(write(tmp_path, "jsonl"), split).documents())
    assert [document.id for document in documents] == [f"q{i}" for i in expected]
    theirs = datasets.load_dataset("json", data_files=str(tmp_path / "corpus.jsonl"), split=split, cache_dir=tmp_path)
    assert [document.text for document in documents] == theirs["text"]


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path):
    for name in ("eli5-train-1.jsonl", "eli5-train-2.jsonl", "eli5-validation.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert [d.text for d in source(tmp_path).documents()] == ["eli5-train-1.jsonl", "eli5-train-2.jsonl"]
    assert [d.text for d in source(tmp_path, "validation").documents()] == ["eli5-validation.jsonl"]
    with pytest.raises(DataError, match=r"no split 'dev'; the splits are: (test, )?train, validation(, test)?"):
        source(tmp_path, "dev")
    with pytest.raises(ConfigError, match="write train"):
        source(tmp_path, "train[1:2")


def test_folders_globs_and_saved_datasets_are_sources(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "part.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "part.jsonl").write_text(json.dumps({"text": "b"}) + "\n")
    assert set(local_splits(str(tmp_path))) == {"train", "validation"}
    assert [d.text for d in source(tmp_path / "*" / "part.jsonl").documents()] == ["a"]
    saved = datasets.DatasetDict(
        train=datasets.Dataset.from_list(RECORDS[:3]), validation=datasets.Dataset.from_list(RECORDS[3:5])
    )
    saved.save_to_disk(tmp_path / "saved")
    assert [d.id for d in source(tmp_path / "saved").documents()] == ["q0", "q1", "q2"]
    assert [d.id for d in source(tmp_path / "saved", "validation").documents()] == ["q3", "q4"]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/corpus", "nowhere.jsonl", "nowhere.json.gz", "nowhere-*.txt"])
def test_what_looks_like_a_path_never_goes_to_the_hub(name: str):
    assert is_local(name)
    with pytest.raises(DataError, match="no such file or folder"):
        source(name)


def test_names_of_hub_datasets_are_not_paths():
    assert not is_local("owner/name")
    assert not is_local("eli5")


ELI5 = {"title": "Why?", "answers": {"text": ["Because.", "So."], "score": [3, 1]}, "empty": "", "none": None}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("answers.text", "Because. So."),
        ("title", "Why?"),
        ("title,answers.text", "Why? Because. So."),
        ("title, empty, none, answers.text", "Why? Because. So."),
    ],
)
def test_fields_may_be_nested_several_and_lists(fields: str, expected: str):
    assert Fields.parse(fields, None).document(ELI5).text == expected


def test_lists_of_records_are_joined_as_in_kilt():
    record = {"output": [{"answer": "One."}, {"meta": 1}, {"answer": "Two."}]}
    assert Fields.parse("output.answer", None).document(record).text == "One. Two."


def test_a_missing_field_is_answered_with_those_that_exist(tmp_path: Path):
    (tmp_path / "c.jsonl").write_text(json.dumps(ELI5) + "\n")
    for field in ("text", "answers.txt", None):
        with pytest.raises(DataError) as caught:
            list(source(tmp_path / "c.jsonl", text_field=field).documents())
        assert "title, answers.text, answers.score, empty, none; set --text_field" in str(caught.value)
        assert "c.jsonl, line 1" in str(caught.value)


@pytest.mark.parametrize("split", ["train[:150%]", "train[-101%:]", "train[200%:]"])
def test_a_slice_of_more_than_the_whole_is_refused(tmp_path: Path, split: str):
    with pytest.raises(ConfigError, match="more than 100 %"):
        source(write(tmp_path, "jsonl"), split)
