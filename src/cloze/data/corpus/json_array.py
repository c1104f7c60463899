"""Read the records of a JSON array of any size, with only a few in memory.

for number, record in read_array(file, "corpus.json", max_bytes=64 * 2**20):
    ...
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from cloze.data.corpus.arrow_columns import is_unicode
from cloze.data.corpus.fields import BadRecord, Record, invalid_utf8
from cloze.data.corpus.jsonl import without_surrogates
from cloze.errors import DataError

_READ = 4 * 2**20
_SPACE = " \t\r\n"


class _Window:
    """The part of the text that is in memory."""

    def __init__(self, file: Any):
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> None:
        """Drop the consumed bytes and read at least as many as remain."""
        block = self._file.read(max(_READ, len(self.text) - self.at))
        self.ended = not block
        self.text = self.text[self.at :] + self._decoder.decode(block, final=self.ended)
        self.at = 0

    def next_character(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            rest = len(self.text)
            while self.at < rest and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < rest or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()


def read_array(file: Any, name: str, max_bytes: int) -> Iterator[tuple[int, Record | BadRecord]]:
    """Yield the number (from 1) and record of each element; BadRecord if it is no object, too large or not UTF-8.

    Raises DataError at invalid JSON, because nothing after it can be trusted.
    """
    window, decode = _Window(file), json.JSONDecoder().raw_decode
    window.more()
    window.text = window.text.lstrip("\ufeff")
    window.next_character()
    window.at += 1  # the bracket that showed that this is an array
    number = 0
    separator = "" if window.next_character() == "]" else ","
    while separator == ",":
        number += 1
        window.next_character()
        value, length = _element(window, decode, f"{name}, record {number}", max_bytes)
        yield number, _checked(value, window.text[window.at : window.at + length], max_bytes)
        window.at += length
        separator = window.next_character()
        if separator not in (",", "]"):
            raise _broken(f"{name}, record {number}", "no comma after it" if separator else "the file ends here")
        window.at += separator == ","
    window.at += 1
    if window.next_character():
        raise _broken(f"{name}, record {number}", "text after the end of the array")


def _element(window: _Window, decode: Any, where: str, max_bytes: int) -> tuple[Any, int]:
    """Return the element at the window's position and its length in characters; read until it is complete."""
    while True:
        enough = window.ended or len(window.text) - window.at > 4 * max_bytes
        try:
            value, end = decode(window.text, window.at)
            follows = window.text[end : end + 1]
            if enough or (follows and (isinstance(value, dict) or follows in _SPACE + ",]")):  # a number may continue
                return value, end - window.at
        except json.JSONDecodeError as error:
            if enough:
                raise _broken(where, error.msg) from None
        except (ValueError, RecursionError) as error:
            raise _broken(where, str(error)) from None
        window.more()


def _checked(value: Any, text: str, max_bytes: int) -> Record | BadRecord:
    if not isinstance(value, dict):
        return BadRecord("not a JSON object")
    if len(text) > max_bytes:
        return BadRecord(f"larger than {max_bytes // 2**20} MiB")
    if not is_unicode(text):
        return invalid_utf8(text)
    return without_surrogates(value) if "\\u" in text else value  # a lone surrogate can only be written escaped


def _broken(where: str, what: str) -> DataError:
    return DataError(f"not JSON ({what})", where=where, hint="mend the file, or get it again if it was cut short")
