"""Packed files, encodings and line ends are read alike, and what is no text is named."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import zstandard
from corpus_files import LINES, TEXTS, put, refused, texts_of

from cloze.config import SourceConfig
from cloze.data.corpus.sources import open_corpus
from cloze.errors import DataError
from cloze.utils.foreign.text_lines import read_lines

PACKED = gzip.compress(b"x" * 99, mtime=0)
PACKED_TWICE = gzip.compress(PACKED, mtime=0)


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


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_file_that_is_not_packed_as_its_name_says_is_told_how_to_name_it(tmp_path: Path, packing: str):
    assert f"remove {packing} from its name" in refused(put(tmp_path / f"x.jsonl{packing}"))
