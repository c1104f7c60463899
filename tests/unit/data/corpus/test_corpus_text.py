"""What is said about text that is in another encoding, or is not what it seems to be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cloze.config import SourceConfig
from cloze.data.corpus.sources import open_corpus
from cloze.errors import DataError
from cloze.utils.foreign.text_lines import read_lines

ROWS = "".join(f"{number},text {number}\n" for number in range(5))


def texts_of(path: Path, **more: str) -> list[str]:
    return [document.text for document in open_corpus(SourceConfig(dataset_name=str(path), **more)).documents()]


def refused(path: Path, **more: str) -> str:
    with pytest.raises(DataError) as caught:
        texts_of(path, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "encoding", "is_western"),
    [
        ("“smart” — quotes’ of a café", "cp1252", True),
        ("Les élèves étaient déjà là, à l'École.", "latin1", True),
        ("Die größten Ärger über Öl", "cp1252", True),
        ("今日は良い天気です。散歩に行きましょう。", "shift-jis", False),
        ("Сегодня хорошая погода", "cp1251", False),
        ("Сегодня хорошая погода", "koi8-r", False),
        ("今天天气很好，我们去散步吧。", "gbk", False),
        ("Zażółć gęślą jaźń", "cp1250", False),
        ("un café crème brûlée", "mac-roman", False),
    ],
)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "json"])
def test_an_encoding_is_proposed_only_for_text_that_looks_like_it(
    tmp_path: Path, text: str, encoding: str, is_western: bool, kind: str
):
    line = json.dumps({"text": text}, ensure_ascii=False)
    content = {"txt": text, "jsonl": line, "csv": f'id,text\n1,"{text}"', "json": f"[{line}]"}[kind]
    (tmp_path / f"c.{kind}").write_bytes(f"{content}\n".encode(encoding))
    told = refused(tmp_path / f"c.{kind}")
    assert "invalid UTF-8; convert the file into UTF-8, " in told
    assert ("iconv -f CP1252" in told) == is_western
    assert "LATIN1" not in told


@pytest.mark.parametrize(("encoding", "name"), [("iso2022_jp", "ISO-2022-JP"), ("iso2022_kr", "ISO-2022-KR")])
def test_text_of_iso_2022_is_named(tmp_path: Path, encoding: str, name: str):
    (tmp_path / "c.txt").write_bytes("日本語\n".encode(encoding))
    assert f"is {name} text, not UTF-8; convert it into UTF-8: iconv -f {name}" in refused(tmp_path / "c.txt")
    (tmp_path / "c.txt").write_bytes(b"\x1b[31mred\x1b(B\x1b[m of a terminal\n")
    assert len(texts_of(tmp_path / "c.txt")) == 1


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv"])
def test_two_byte_order_marks_are_no_text(tmp_path: Path, kind: str):
    content = {"txt": "a", "jsonl": '{"text": "a"}', "json": '[{"text": "a"}]', "csv": "text\na"}[kind]
    (tmp_path / f"c.{kind}").write_text(f"\ufeff\ufeff{content}\n", encoding="utf-8")
    assert texts_of(tmp_path / f"c.{kind}") == ["a"]


@pytest.mark.parametrize(
    ("rows", "is_named"),
    [
        ('7,"He said\n8,b"\n', True),
        ('7,"He said\n8,this is, well\n9,and, so\n10,closing"\n', True),
        ('d7,"He said\nd8, b"\n', True),
        ('7,"He said\n\nthis is, well,\nprose of 8, or so"\n', False),
        ('7,"1. one\n2. two, three"\n', False),
        ('x,"one\ntwo, three"\n', False),
    ],
)
def test_a_line_like_a_row_inside_quotes_is_named(
    tmp_path: Path, rows: str, is_named: bool, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "c.csv").write_text(f"id,text\n{ROWS}{rows}11,c\n")
    assert len(texts_of(tmp_path / "c.csv")) == 7
    assert ("record 6 (line 7) is a quoted text with a line like a row" in capsys.readouterr().err) == is_named


def test_a_row_that_ends_inside_quotes_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "c.csv").write_text('text,id\na,1\n"He said,2\nb",3\nc,4\n')
    assert len(texts_of(tmp_path / "c.csv")) == 3
    assert "record 2 (line 3) is a quoted text with a line like a row ('He said,2')" in capsys.readouterr().err


def test_empty_lines_before_the_header_are_skipped(tmp_path: Path):
    (tmp_path / "c.csv").write_text("\n\nid,text\n1,a\n")
    assert texts_of(tmp_path / "c.csv") == ["a"]


def test_a_slice_beyond_every_number_is_the_whole(tmp_path: Path):
    (tmp_path / "c.txt").write_text("a\nb\n")
    assert texts_of(tmp_path / "c.txt", split=f"train[:{10**22}]") == ["a", "b"]


@pytest.mark.parametrize("name", ["c.parquet", "c.arrow", "c.jsonl.gz", "c.jsonl.zst", "c.jsonl", "c.csv"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "is a pointer of Git LFS" in refused(tmp_path / name)
    assert "git lfs pull" in refused(tmp_path / name)


def test_packed_sentences_are_to_be_unpacked(tmp_path: Path):
    (tmp_path / "s.gz").write_bytes(gzip.compress(b"a\n"))
    with pytest.raises(DataError, match="is gzip data, not text; unpack it"):
        read_lines(tmp_path / "s.gz")


@pytest.mark.parametrize(
    ("record", "is_named"),
    [
        ('{"text": "lost", "text": "a"}', True),
        ('{"id": "x", "id": "y", "text": "a"}', True),
        ('{"text": "a", "x": {"y": 1, "y": 2}}', False),
        ('{"text": "a", "x": {"text": 1}}', False),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_field_that_a_record_has_twice_is_named(
    tmp_path: Path, record: str, is_named: bool, kind: str, capsys: pytest.CaptureFixture[str]
):
    records = ['{"text": "b"}', record, record]
    content = "[" + ",\n".join(records) + "]" if kind == "json" else "\n".join(records)
    (tmp_path / f"c.{kind}").write_text(content + "\n")
    assert texts_of(tmp_path / f"c.{kind}") == ["b", "a", "a"]
    told = capsys.readouterr().err
    assert ("record 2 has several fields" in told) == is_named
    assert told.count("warning") == is_named
