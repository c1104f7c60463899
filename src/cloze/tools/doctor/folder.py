"""The folder that runs are to be written to: is it one folder for all ranks, has it room, how fast is it.

All files written here are removed in any case.
"""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloze.tools.doctor.meeting import Meeting
from cloze.utils.atomic_files import remove_tree

APPEAR_SECONDS = (
    10.0  # what another node wrote may be seen late: NFS keeps attributes for 3 s and more (nfs(5), acregmin)
)
PREFIX = ".cloze-doctor-"


def nearest_folder(path: str) -> Path:
    """Return the folder itself, or the nearest one above it that exists: a run makes its own folder there."""
    folder = Path(path).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def measure_disk(folder: Path, megabytes: int) -> dict[str, Any]:
    """Free bytes, and MB/s (10^6 bytes) of writing one file including fsync, and of reading it back from the disk.

    The file is dropped from the page cache before it is read; a file system may still answer from its own. The file
    is unlinked before it is written, so that nothing is left even if this process is killed.
    """
    name, block = folder / f"{PREFIX}{secrets.token_hex(8)}", os.urandom(1 << 20)
    facts: dict[str, Any] = {"path": str(folder)}
    try:
        usage = os.statvfs(folder)
        facts["free_bytes"] = usage.f_bavail * usage.f_frsize
        begin = time.perf_counter()
        with open(name, "w+b", buffering=0) as file:
            name.unlink()
            for _ in range(megabytes):
                file.write(block)
            os.fsync(file.fileno())
            facts["write_mb_per_second"] = megabytes * len(block) / 1e6 / (time.perf_counter() - begin)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            begin = time.perf_counter()
            while file.read(len(block)):
                pass
        facts["read_mb_per_second"] = megabytes * len(block) / 1e6 / (time.perf_counter() - begin)
    except OSError as error:
        facts["error"] = os.strerror(error.errno or 0)
    return facts


@dataclass
class Shared:
    """`error`: why rank 0 cannot write there, or ""; `ranks`: for each other rank `reads` and `written`, "" or what
    went wrong, and `seconds` until both were seen."""

    error: str = ""
    ranks: dict[int, dict[str, Any]] = field(default_factory=dict)


def check_shared(meeting: Meeting, folder: Path) -> Shared:
    """Rank 0 writes one file, which all must read; each of them writes one, which rank 0 must read.

    Rank 0 returns what came out. No rank looks for a file before it is written: NFS would remember its absence.
    """
    own = f"{PREFIX}{secrets.token_hex(8)}"
    process = meeting.process
    if process.rank:
        _other_rank(meeting)
        return Shared()
    staged = folder / own
    try:
        found = Shared()
        try:
            staged.mkdir()
            _write(staged / "0", own)
        except OSError as error:
            found.error = os.strerror(error.errno or 0)
        meeting.tell("folder", {"path": str(staged), "nonce": own, "error": found.error})
        if not found.error:
            found.ranks = {rank: _look_back(meeting, rank, staged, own) for rank in meeting.ranks[1:]}
        return found
    finally:
        remove_tree(staged, quietly=True)


def _other_rank(meeting: Meeting) -> None:
    """Read rank 0's file, write this rank's own, and report both."""
    made = meeting.ask(0, "folder")
    if made is None or made["error"]:
        return
    rank, path = meeting.process.rank, Path(made["path"])
    reads, seconds = _read(path / "0", made["nonce"])
    written = ""
    try:
        _write(path / str(rank), f"{made['nonce']}-{rank}")
    except OSError as error:
        written = os.strerror(error.errno or 0)
    meeting.tell("seen", {"reads": reads, "written": written, "seconds": seconds})


def _look_back(meeting: Meeting, rank: int, staged: Path, nonce: str) -> dict[str, Any]:
    """Return rank 0's result of reading another rank's file."""
    result = meeting.ask(rank, "seen", meeting.timeout + APPEAR_SECONDS)
    if result is None:
        meeting.silent.append(rank)
        return {"reads": "it says nothing", "written": "", "seconds": 0.0}
    if not result["written"] and not result["reads"]:
        result["written"], seconds = _read(staged / str(rank), f"{nonce}-{rank}")
        result["seconds"] = max(result["seconds"], seconds)
    return result


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, expected: str) -> tuple[str, float]:
    """Wait up to 10 s until the file holds `expected`; return "" or what is wrong, and the seconds waited."""
    begin = time.monotonic()
    while True:
        try:
            text = path.read_text(encoding="utf-8")
            problem = "" if text == expected else "it holds something else"
        except OSError as error:
            problem = os.strerror(error.errno or 0)
        waited = time.monotonic() - begin
        if not problem or waited > APPEAR_SECONDS:
            return problem, waited
        time.sleep(0.05)
