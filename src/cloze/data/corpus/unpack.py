"""Open files that may be packed, and unpack zstd, also the long windows and the many frames of public dumps, which
pyarrow refuses."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import zstandard

from cloze.utils.foreign.text_lines import Blocks

MAX_WINDOW_BYTES = 2**31  # of `zstd --long=31`, the largest that the format's own tool writes
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_BUFFER = 2**20
_READ = 4096  # packed bytes at a time, which unpack to at most 128 MiB


def packed_as(path: Path) -> str | None:
    """Return the suffix that matches a file's first bytes; None if it is not compressed or cannot be read."""
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(4)
        return next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), None)
    return None


class Meter:
    """Tells how much of a file has been read so far, before unpacking."""

    file: Any = None

    def bytes_read(self) -> int:
        """Return bytes of the file, 0 before it is opened and after it is closed."""
        return self.file.tell() if self.file is not None and not self.file.closed else 0


def open_binary(path: Path, meter: Meter | None = None) -> Any:
    """Return the unpacked bytes of a file; a context manager. A packed file that was cut short raises OSError at its
    end."""
    packing = COMPRESSIONS.get(path.suffix.lower())
    file = open(path, "rb", buffering=_BUFFER)  # noqa: SIM115
    if meter is not None:
        meter.file = file
    if packing == "zstd":
        return unpack_zstd(file)
    return io.BufferedReader(pyarrow.input_stream(file, compression=packing), _BUFFER) if packing else file


def unpack_zstd(file: Any) -> Any:
    """Return the unpacked bytes of a file. Reading raises OSError if it was cut short, or is not zstd."""
    return io.BufferedReader(Blocks(_unpacked(file), file), _BUFFER)


def _unpacked(file: Any) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    frame, is_begun = decompressor.decompressobj(), False
    try:
        while packed := file.read(_READ):
            while packed:
                yield frame.decompress(packed)
                packed, is_begun = frame.unused_data, not frame.eof
                if frame.eof:
                    frame = decompressor.decompressobj()
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from None
    if is_begun:
        raise OSError("the file ends inside a frame")
