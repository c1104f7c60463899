"""What identifies the files of a corpus: a checksum over every byte.

    describe_contents([Path("corpus.jsonl")], identify=True)
    # [{"name": "corpus.jsonl", "bytes": ..., "digest": "sha256:...", "content": "sha256-64MiB:..."}]

A file above 64 MiB also has `content`, the SHA-256 of the SHA-256 sums of its parts of 64 MiB, which all cores compute
together. (Its `digest` is of samples: it is what folders prepared by older versions say.) The checksum is kept in the
cache folder under what changes with any write to the file: path, size, inode, time of the last change (ctime) and of
the last modification (mtime). So a corpus is read once for it, for any number of processes and machines.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cloze.errors import DataError, DiskError
from cloze.utils.atomic_files import write_json
from cloze.utils.file_locks import locked
from cloze.utils.foreign.json_yaml import read_mapping
from cloze.utils.foreign.paths import real_path
from cloze.utils.terminal.console import progress, say

PART_BYTES = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 2**18
_READ = 2**20
# A write in the same tick of the clock as the last one leaves no trace in the times of a file.
SETTLED_SECONDS = 2.0
_MEGABYTE = 10**6


def default_cache() -> Path:
    """Return $CLOZE_CACHE, or `cloze` in $XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("CLOZE_CACHE"):
        return Path(os.environ["CLOZE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cloze"


def describe_contents(files: list[Path], identify: bool) -> list[dict[str, Any]]:
    """Return name, size and checksums of each file; without `identify`, of files above 64 MiB only samples.

    Raises DataError if a file cannot be read, or changes meanwhile.
    """
    described = []
    for file in files:
        size = _status(file).st_size
        facts = {"name": file.name, "bytes": size, "digest": digest(file)}
        if identify and size > PART_BYTES:
            facts["content"] = content_digest(file)
        described.append(facts)
    return described


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes; above 64 MiB, of 64 samples of 256 KiB, spread evenly from end to end."""
    size = _status(path).st_size
    found = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= PART_BYTES:
            while block := file.read(_READ):
                found.update(block)
            return f"sha256:{found.hexdigest()}"
        for number in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            found.update(file.read(_SAMPLE_BYTES))
    return f"sampled-sha256:{found.hexdigest()}"


def content_digest(path: Path) -> str:
    """Return a checksum over all bytes of a file, from the cache if nothing has written to the file since.

    Raises DataError if it cannot be read, or changes meanwhile.
    """
    place = default_cache() / "checksums"
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
    entry = place / f"{hashlib.sha256(os.fsencode(real_path(path))).hexdigest()[:32]}.json"
    waiting = f"waiting for another process that reads {path.name}"
    with locked(entry.with_suffix(".lock"), lambda: say("checksum", waiting)):
        before = signature(path)
        known = read_mapping(entry)
        if known.get("signature") == before and isinstance(known.get("content"), str):
            return str(known["content"])
        begin = time.time()
        found = _whole_digest(path)
        if signature(path) != before:
            raise DataError("changed while it was read", where=path, hint="start again when it is complete")
        if begin - _status(path).st_ctime > SETTLED_SECONDS:
            with contextlib.suppress(OSError, DiskError):
                write_json(entry, {"signature": before, "content": found})
        return found


def _whole_digest(path: Path) -> str:
    size = _status(path).st_size
    starts = range(0, size, PART_BYTES)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    whole = hashlib.sha256()
    with progress("checksum", total=size // _MEGABYTE, unit="MB") as advance, ThreadPoolExecutor(threads) as pool:
        for part in pool.map(lambda start: _part_digest(path, start), starts):
            whole.update(part)
            advance(PART_BYTES // _MEGABYTE)
    return f"sha256-64MiB:{whole.hexdigest()}"


def _part_digest(path: Path, start: int) -> bytes:
    found, left = hashlib.sha256(), PART_BYTES
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while left and (block := file.read(min(left, _READ))):
            found.update(block)
            left -= len(block)
    return found.digest()


def signature(path: Path) -> list[int]:
    """Return what any write to a file changes: size, times of modification and change in ns, inode."""
    status = _status(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path, hint="check the path") from None
