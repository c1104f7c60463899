"""Which files a corpus is made of, and in which shapes: nothing is read twice, or left out, without a word."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest
from corpus_files import TEXTS, put, refused, texts_of

from cloze.data.corpus import content
from cloze.data.corpus.content import content_digest, describe_contents
from cloze.data.corpus.local_files import find_local, local_splits
from cloze.errors import DataError

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


def test_markdown_is_read_by_its_name_or_from_a_folder_without_other_data(tmp_path: Path):
    """Beside data, Markdown is a note about it (README.md is one anywhere)."""
    for name in ("docs/one.md", "docs/more/two.markdown", "docs/three.text", "mixed/a.jsonl", "mixed/notes.md"):
        put(tmp_path / name)
    (tmp_path / "docs" / "three.text").rename(tmp_path / "docs" / "more" / "three.text")
    assert find_local(str(tmp_path / "docs")).splits == {"train": [tmp_path / "docs" / "more" / "three.text"]}
    (tmp_path / "docs" / "more" / "three.text").unlink()
    put(tmp_path / "docs" / "README.md")
    found = find_local(str(tmp_path / "docs"))
    assert [path.name for path in found.splits["train"]] == ["two.markdown", "one.md"]
    assert not found.notes
    mixed = find_local(str(tmp_path / "mixed"))
    assert [path.name for path in mixed.splits["train"]] == ["a.jsonl"]
    assert any("notes.md" in note for note in mixed.notes)
    assert find_local(str(tmp_path / "mixed" / "*.md")).splits == {"train": [tmp_path / "mixed" / "notes.md"]}


def test_files_that_are_no_data_are_named(tmp_path: Path):
    """Also those without a suffix; hidden files and metadata of datasets are nobody's text."""
    for name in ("a.jsonl", "chapter-one", "sub/notes.doc", "README.md", ".hidden", "dataset_info.json"):
        put(tmp_path / name)
    (note,) = [note for note in find_local(str(tmp_path)).notes if note.startswith("not read")]
    assert "chapter-one, notes.doc" in note
    assert not {"a.jsonl", "README.md", ".hidden", "dataset_info.json"} & set(note.replace(";", ",").split(", "))
    with pytest.raises(DataError) as caught:
        texts_of(tmp_path / "chapter-one")
    assert Path(str(caught.value.where)).name == "chapter-one"


def test_every_line_of_a_markdown_file_is_text(tmp_path: Path):
    for name in ("a.txt", "a.text", "a.md", "a.MD.gz"):
        write = gzip.open if name.endswith("gz") else open
        with write(tmp_path / name, "wt") as file:
            file.write("# One\n\n* two\n")
    assert texts_of(tmp_path / "a.md") == texts_of(tmp_path / "a.txt") == texts_of(tmp_path / "a.MD.gz") != []
    assert texts_of(tmp_path / "a.text") == texts_of(tmp_path / "a.txt")


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
