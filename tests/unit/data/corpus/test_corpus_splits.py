"""Which files make which split if shards are missing, by globs, and by the README.md of a dataset."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest

from cloze.data.corpus.local_files import find_local, local_splits
from cloze.errors import DataError

LINE = json.dumps({"text": "a"}) + "\n"


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(LINE)
    return folder


def refused(name: Path | str, config_name: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        find_local(str(name), config_name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def splits(name: Path | str, config_name: str | None = None) -> dict[str, list[str]]:
    return {split: [path.name for path in files] for split, files in local_splits(str(name), config_name).items()}


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "train-00001-of-00003.jsonl"),
        (["data/train-00000-of-00002.jsonl.gz"], "train-00001-of-00002.jsonl.gz"),
        (["data-00000-of-00002.arrow"], "data-00001-of-00002.arrow"),
        (["c4-train.00001-of-01024.json", "a.json"], "c4-train.00000-of-01024.json"),
        (["x-0001-of-0003.txt", "x-0003-of-0003.txt"], "x-0002-of-0003.txt"),
    ],
)
def test_a_missing_shard_is_named(tmp_path: Path, names: list[str], missing: str):
    put(tmp_path, *names)
    assert f"{missing} is missing beside" in refused(tmp_path)
    assert f"{missing} is missing beside" in refused(f"{tmp_path}/**/*")


def test_whole_sets_of_shards_and_chosen_ones_are_read(tmp_path: Path):
    put(tmp_path / "a", "x-00000-of-00002.jsonl", "x-00001-of-00002.jsonl", "y-00001-of-00001.jsonl")
    put(tmp_path / "a", "page-3-of-12.txt", "2024-00001-of.txt")
    put(tmp_path / "a", "z-00000-of-00002-a1b2.jsonl", "z-00001-of-00002-c3d4.jsonl")
    assert len(splits(tmp_path / "a")["train"]) == 7
    put(tmp_path / "b", "x-00000-of-00003.jsonl", "x-00002-of-00003.jsonl")
    assert len(splits(f"{tmp_path}/b/x-0000[02]*")["train"]) == 2
    assert len(splits(tmp_path / "b" / "x-00000-of-00003.jsonl")["train"]) == 1


def test_folders_that_a_glob_matches_name_splits(tmp_path: Path):
    put(tmp_path / "val", "train/a.jsonl", "dev/b.jsonl", "dev/c.jsonl", "x/eval/d.jsonl")
    assert splits(f"{tmp_path}/val/*/*.jsonl") == {"train": ["a.jsonl"], "validation": ["b.jsonl", "c.jsonl"]}
    assert set(splits(f"{tmp_path}/val/**/*.jsonl")) == {"train", "validation", "test"}
    assert splits(f"{tmp_path}/val/dev/*.jsonl") == {"train": ["b.jsonl", "c.jsonl"]}
    assert splits(f"{tmp_path}/*/dev/*.jsonl") == {"validation": ["b.jsonl", "c.jsonl"]}


def test_what_a_glob_matches_besides_files_is_named(tmp_path: Path):
    put(tmp_path, "a/x.jsonl", "b/x.jsonl")
    assert f"matches folders only; match their files: {tmp_path}/*/*" in refused(f"{tmp_path}/*")
    assert "braces are not expanded" in refused(f"{tmp_path}/{{a,b}}.jsonl")
    put(tmp_path, "c.jsonl")
    os.mkfifo(tmp_path / "d.jsonl")
    assert "d.jsonl: is no regular file" in refused(f"{tmp_path}/*.jsonl")


def card(folder: Path, configs: str) -> Path:
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{configs}---\n# About\n")
    return folder


SPLITS = """- config_name: default
  data_files:
  - split: train
    path: [a.jsonl, more/*.jsonl]
  - split: test
    path: b-*.jsonl
"""
TWO = """- config_name: en
  data_files: en/*.jsonl
- config_name: de
  data_files: {train: de/*.jsonl}
"""


def test_the_splits_of_a_readme_are_obeyed_as_by_datasets(tmp_path: Path):
    card(put(tmp_path / "one", "a.jsonl", "b-train.jsonl", "more/val.jsonl", "other.jsonl"), SPLITS)
    assert splits(tmp_path / "one") == {"train": ["a.jsonl", "val.jsonl"], "test": ["b-train.jsonl"]}
    theirs = datasets.load_dataset(str(tmp_path / "one"), cache_dir=str(tmp_path / ".cache"))
    assert {name: len(rows) for name, rows in theirs.items()} == {"train": 2, "test": 1}
    two = card(put(tmp_path / "two", "en/val.jsonl", "de/a.jsonl"), TWO)
    assert "2 configurations: en, de; choose one with --dataset_config_name" in refused(two)
    assert "no configuration 'fr'; the configurations are: en, de" in refused(two, "fr")
    assert splits(two, "de") == {"train": ["a.jsonl"]}
    assert splits(card(two, TWO + "  default: true\n")) == {"train": ["a.jsonl"]}
    (two / "README.md").write_text("---\nlicense: mit\n---\nconfigs: none\n")
    assert splits(two) == {"validation": ["val.jsonl"], "train": ["a.jsonl"]}
    (two / "README.md").write_bytes("# Ein Text über configs\n".encode("latin-1"))
    assert len(splits(two)) == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("../x.jsonl", "may name files in its folder only"),
        ("/etc/passwd", "may name files in its folder only"),
        ("hf://datasets/x/y.jsonl", "may name files in its folder only"),
        ("gone-*.jsonl", "names gone-*.jsonl as files of train, which are missing"),
        ("more/../../x.jsonl", "may name files in its folder only"),
        ("..\\x.jsonl", "may name files in its folder only"),
        ("x.jsonl\n  data_dir: ..", "may name files in its folder only"),
        ("passwd\n  data_dir: /etc", "may name files in its folder only"),
        ("a-*.jsonl", "a-00000-of-00002.jsonl is missing beside a-00001-of-00002.jsonl"),
        ("{x: [1]}", "may name files in its folder only"),
        ("&a [*a]", "uses the alias"),
    ],
)
def test_files_that_a_readme_cannot_name_are_refused(tmp_path: Path, files: str, expected: str):
    put(tmp_path, "x.jsonl")
    card(put(tmp_path / "c", "a.jsonl", "a-00001-of-00002.jsonl"), f"- config_name: default\n  data_files: {files}\n")
    assert expected in refused(tmp_path / "c")
