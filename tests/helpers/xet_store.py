"""The Hub's Xet storage on this machine: hf_xet's own file-based store, which it uses for addresses `local://FOLDER`.

The real client chunks, deduplicates and uploads into it; the Hub of the tests reads from it what a commit names. A
shard lists files: 48 bytes a record, of which 32 are a hash; hashes are four little-endian integers.

    xet_hash, content = read_content(folder, sha256)
"""

from __future__ import annotations

import struct
import tempfile
import time
from pathlib import Path

RECORD, HEADER = 48, 48
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30
END = b"\xff" * 32


def files_of(shard: bytes) -> dict[str, tuple[str, int]]:
    """SHA-256 -> (Xet hash, size in bytes) of the files that a shard describes."""
    found, at = {}, HEADER
    while shard[at : at + 32] != END:
        name, flags, count = shard[at : at + 32], *struct.unpack("<II", shard[at + 32 : at + 40])
        entries = [shard[at + RECORD * (1 + n) :][:RECORD] for n in range(count)]
        size = sum(struct.unpack("<I", entry[36:40])[0] for entry in entries)
        at += RECORD * (1 + count * (2 if flags & WITH_VERIFICATION else 1))
        if flags & WITH_METADATA:
            found[as_text(shard[at : at + 32])] = as_text(name), size
            at += RECORD
    return found


def as_text(raw: bytes) -> str:
    """A hash as it is written: four 64-bit numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def read_content(store: Path, sha256: str) -> tuple[str, bytes]:
    """(Xet hash, content) of a file that was uploaded. Raises KeyError where there is none."""
    import hf_xet

    files: dict[str, tuple[str, int]] = {}
    for shard in store.glob("xet/xorbs/shards/*.mdb"):
        files |= files_of(shard.read_bytes())
    xet_hash, size = files[sha256]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "content"
        with hf_xet.XetSession().new_file_download_group(
            endpoint=f"local://{store}", token="t", token_expiry_unix_secs=int(time.time()) + 3600
        ) as group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(target))
        return xet_hash, target.read_bytes()
