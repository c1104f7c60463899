"""Read text of other programs: byte-order marks, encodings and line ends are handled in one place.

    file = utf8_file(binary_file, "corpus.txt")     # a binary file of UTF-8, whatever the encoding was
    lines = read_lines("sentences.txt")     # str, without their ends, for small files

UTF-8, and UTF-16 and UTF-32 with a byte-order mark, are read. UTF-16 without a mark, and data that is no text at all,
is refused by name: read as UTF-8 it would be a text full of NUL characters. A line ends with LF, CR LF or CR.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloze.errors import DataError
from cloze.utils.foreign.paths import read_bytes

HEAD_BYTES = 2**16
MAX_FILE_BYTES = 2**30
UTF8_MARK = codecs.BOM_UTF8
_BLOCK = 2**20
# The mark of UTF-32 begins with that of UTF-16, so that it is compared first.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    UTF8_MARK: "utf-8",
}
_LFS = b"version https://git-lfs"
_OTHER_DATA = {
    b"\x1f\x8b": ("gzip data", "add .gz to its name"),
    b"\x28\xb5\x2f\xfd": ("zstd data", "add .zst to its name"),
    b"PAR1": ("Parquet data", "name it .parquet"),
    b"ARROW1": ("Arrow data", "name it .arrow"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"BZh": ("bzip2 data", "unpack it"),
    b"\xfd7zXZ": ("xz data", "unpack it"),
    b"\x04\x22\x4d\x18": ("lz4 data", "unpack it"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it"),
    b"Rar!": ("a RAR archive", "unpack it"),
    b"%PDF-": ("a PDF", "convert it into text"),
    b"SQLite format 3\0": ("a SQLite database", "export its text"),
    _LFS: ("a pointer of Git LFS", "get the data itself with `git lfs pull`"),
}
# The escape sequences that begin text of two bytes a character. Those of terminals are others.
_ISO_2022 = re.compile(rb"\x1b\$([@B]|\)[AC])")
_ISO_2022_NAMES = {b"@": "JP", b"B": "JP", b")A": "CN", b")C": "KR"}
_WESTERN = re.compile("[À-ÖØ-öø-ÿŠšŽžŒœŸ“”„‘’–—…•·€£§©®™°«»‹›¡¿´²³½¼ªº×µ\xa0]")


def looks_western(raw: bytes) -> bool:
    """Return whether bytes that are not UTF-8 may be CP1252: single accented letters, not capital ones after small
    ones, among others, and typographic signs."""
    try:
        text = raw.decode("cp1252")
    except UnicodeDecodeError:
        return False
    high = [character for character in text if not character.isascii()]
    letters = sum(character.isalpha() for character in high)
    return (
        all(map(_WESTERN.match, high))
        and letters <= max(1, sum(character.isascii() and character.isalpha() for character in text))
        and not re.search(r"[^\W\d_a-zA-Z]{3}|[a-z][À-ÖØ-ÞŠŽŒŸ](?![A-Z])", text)
    )


def is_lfs_pointer(path: Path | str) -> bool:
    """Return whether a file is a Git LFS pointer instead of the data."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_LFS)) == _LFS
    except OSError:
        return False


def encoding_of(head: bytes, where: object, may_be_packed: bool = True) -> str:
    """Return the encoding of a text by its first bytes. Raises DataError for what is no text, or UTF-16 that lacks its
    byte-order mark, or Japanese, Chinese or Korean text of ISO-2022.

    `may_be_packed`: files named .gz or .zst are unpacked, so that `head` is of what is in them.
    """
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    for magic, (what, hint) in _OTHER_DATA.items():
        if head.startswith(magic):
            if not may_be_packed and hint.startswith("add "):
                raise DataError(f"is {what}, not text", where=where, hint="unpack it")
            if str(where).lower().endswith((".gz", ".zst")):  # these are the bytes inside of it
                raise DataError(f"holds {what}, not text", where=where, hint="it is packed twice: unpack it once")
            raise DataError(f"is {what}, not text", where=where, hint=hint)
    if head[257:262] == b"ustar":
        raise DataError("is a tar archive, not text", where=where, hint="unpack it")
    if match := _ISO_2022.search(head):
        name = f"ISO-2022-{_ISO_2022_NAMES[match[1]]}"
        hint = f"convert it into UTF-8: iconv -f {name} -t UTF-8 OLD > NEW"
        raise DataError(f"is {name} text, not UTF-8", where=where, hint=hint)
    sample = head[: HEAD_BYTES // 4 * 4]
    nulls = sample.count(0)
    if nulls >= max(2, len(sample) // 100):
        by_place = [sample[place::4].count(0) for place in range(4)]
        raise _not_utf8(_guess(by_place, nulls, len(sample)), where)
    return "utf-8"


def _guess(by_place: list[int], nulls: int, size: int) -> str | None:
    """Return the encoding that puts NUL bytes at these places of four; None if no encoding does."""
    even, odd = by_place[0] + by_place[2], by_place[1] + by_place[3]
    if nulls > 0.6 * size:
        return "UTF-32LE" if by_place[3] > by_place[0] else "UTF-32BE"
    if odd > 9 * even:
        return "UTF-16LE"
    return "UTF-16BE" if even > 9 * odd else None


def _not_utf8(encoding: str | None, where: object) -> DataError:
    if encoding is None:
        return DataError("is binary data, not text", where=where, hint="convert it into UTF-8 text")
    return DataError(
        f"is {encoding} text without a byte-order mark",
        where=where,
        hint=f"convert it into UTF-8: iconv -f {encoding} -t UTF-8 OLD > NEW",
    )


def is_plain(head: bytes, where: object) -> bool:
    """Return whether a text can be read from any place: UTF-8 with lines that end with LF or CR LF."""
    return encoding_of(head, where) == "utf-8" and not _ends_with_cr(head)


def utf8_file(file: Any, where: object) -> Any:
    """Return a binary file from its beginning as UTF-8; itself if it is that already and can be rewound.

    Text that is not plain (see `is_plain`) has LF as its only line end afterwards. A UTF-8 mark is kept, see
    `without_mark`.
    """
    head = read_head(file)
    encoding, cr = encoding_of(head, where), _ends_with_cr(head)
    if encoding == "utf-8" and not cr and file.seekable():
        file.seek(0)
        return file
    blocks = _blocks(head, file)
    if encoding != "utf-8":
        blocks = _decoded(blocks, encoding)
        cr = True
    return io.BufferedReader(Blocks(_with_lf(blocks) if cr else blocks, file), _BLOCK)


def read_head(file: Any, size: int = HEAD_BYTES) -> bytes:
    """Read the first bytes of a file, fewer only at its end."""
    head = b""
    while len(head) < size and (block := file.read(size - len(head))):
        head += block
    return head


def without_mark(line: bytes) -> bytes:
    """Return a line without UTF-8 marks, which are at the beginning of a file, or of one that was appended to it."""
    while line.startswith(UTF8_MARK):
        line = line[len(UTF8_MARK) :]
    return line


def split_lines(text: str) -> list[str]:
    """Cut a text at LF, CR LF and CR. `str.splitlines` cuts at further characters, U+2028 among them, that stand
    inside sentences."""
    lines = re.split("\r\n|\r|\n", text)
    return lines if lines[-1] else lines[:-1]


def read_lines(path: Path | str) -> list[str]:
    """Return the lines of a small file without their ends and the white space around them; empty lines are left out.

    Raises DataError if it cannot be read, is above 1 GiB, or is not Unicode.
    """
    raw = read_bytes(path, MAX_FILE_BYTES, typed=True)
    encoding = encoding_of(raw[:HEAD_BYTES], path, may_be_packed=False)
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"line {number} is not {encoding.upper()}", where=path, hint="convert it into UTF-8") from None
    if "\0" in text:
        raise DataError("holds NUL characters", where=path, hint="convert it into UTF-8 text")
    lines = (line.lstrip("\ufeff").strip() for line in split_lines(text))
    return [line for line in lines if line]


def _ends_with_cr(head: bytes) -> bool:
    return b"\r" in head and b"\n" not in head


def _blocks(head: bytes, file: Any) -> Iterator[bytes]:
    yield head
    while block := file.read(_BLOCK):
        yield block


def _decoded(blocks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Yield text as UTF-8, without its byte-order mark. Lone surrogates are kept, so that their line is rejected."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    first = True
    try:
        for block in blocks:
            text = decoder.decode(block)
            yield (text.removeprefix("\ufeff") if first else text).encode("utf-8", "surrogatepass")
            first = first and not text
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise OSError(f"not {encoding.upper()}: {error.reason}") from None


def _with_lf(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield text with LF in place of CR LF and CR."""
    held = b""
    for block in blocks:
        text = held + block
        held = b"\r" if text.endswith(b"\r") else b""
        yield text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    yield b"\n" if held else b""


class Blocks(io.RawIOBase):
    """Blocks of bytes as a file, which closes the file that they come from."""

    def __init__(self, blocks: Iterator[bytes], source: Any):
        self._blocks, self._source, self._left = blocks, source, memoryview(b"")

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with what comes next; return the number of bytes, 0 at the end."""
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def close(self) -> None:
        """Close the file below, too."""
        if not self.closed:
            self._source.close()
        super().close()
