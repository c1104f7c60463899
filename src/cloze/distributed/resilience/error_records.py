"""Record why a run failed, in the run's folder.

runs/NAME/errors/rank-00003.json   a failing rank's own error, or the end of another rank that it noticed
runs/NAME/error.json               a summary: the rank that failed first, and the others

Ranks may share nothing but this folder, and any of them may be dead. So each failing rank writes its own record, and
rewrites error.json from all records unless it is listed there already. One surviving rank is enough, and the last
error.json is complete. Files are written atomically.

    log = FailureLog(run_dir, rank, world_size, secrets)
    log.leave(error)
    log.publish()
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cloze.errors import ClozeError, LostRank, one_line, phase_of
from cloze.utils import run_files
from cloze.utils.atomic_files import remove_tree, sync
from cloze.utils.foreign.json_yaml import dump_json, read_json, read_mapping
from cloze.utils.foreign.paths import write_new
from cloze.utils.shareable import SECRETS
from cloze.utils.terminal.redact import MIN_CHARACTERS, redacted

FOLDER = "errors"
SHOWN = ("rank", "host", "phase", "step", "error", "kind", "exit_code", "time")
SAME_MOMENT_SECONDS = 1.0  # clocks of hosts differ: within this time the lowest rank counts as the first
DISK_SECONDS = 10.0  # a disk that hangs must not keep a process from ending
_CONNECTION = re.compile(r"[Cc]onnect|[Ss]ocket|[Tt]imed? ?out|gloo|NCCL|[Bb]roken pipe")
# Messages of gloo and NCCL if another rank does not answer or its connection is closed.
_UNANSWERED = re.compile(r"gloo/transport|Timed out waiting|Connection (closed|reset) by|ncclRemoteError|Broken pipe")
Record = dict[str, Any]


def is_lost_connection(line: str) -> bool:
    """Return whether an error's line reports a broken connection: probably a consequence of another rank's end."""
    return _CONNECTION.search(line) is not None


def is_unanswered(error: BaseException) -> bool:
    """Return whether the error is a collective operation that other ranks did not join."""
    return isinstance(error, RuntimeError | OSError) and _UNANSWERED.search(str(error)) is not None


def timestamp(seconds: float) -> str:
    """Return the UTC time in ISO 8601, which sorts chronologically: seconds since the epoch -> text."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def record_of(error: BaseException, rank: int, secrets: tuple[str, ...], now: float) -> Record:
    """Return a rank's record: SHOWN, `follow_up` (probably caused by another rank) and `lost` (that rank)."""
    phase, step = phase_of(error)
    line = one_line(error)
    lost = error.lost if isinstance(error, LostRank) else None
    if lost is not None and lost["rank"] == rank:  # this rank itself hangs
        return redacted_values({"follow_up": False, "lost": None, **lost}, secrets)
    if isinstance(error, LostRank):
        follow_up = True
    else:
        known = isinstance(error, ClozeError)
        follow_up = line.startswith("rank 0 failed: ") if known else is_lost_connection(line)
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "phase": phase,
        "step": step,
        "error": redacted(line, secrets),
        "kind": type(error).__name__,
        "exit_code": exit_code_of(error),
        "time": timestamp(now),
        "follow_up": follow_up,
        "lost": None if lost is None else redacted_values(lost, secrets),
    }


def lost_record(rank: int, where: dict[str, Any], line: str, kind: str, code: int, when: float) -> dict[str, Any]:
    """Return the entry of error.json for a rank that may have left no record."""
    place = {key: where[key] for key in ("host", "phase", "step")}
    return {"rank": rank, **place, "error": line, "kind": kind, "exit_code": code, "time": timestamp(when)}


def exit_code_of(error: BaseException) -> int:
    """Return the exit code for an error: a ClozeError's own, 1 for others."""
    return error.exit_code if isinstance(error, ClozeError) else 1


def redacted_values(values: Record, secrets: tuple[str, ...]) -> Record:
    """Return a record with the secrets in its texts redacted."""
    return {k: redacted(v, secrets) if isinstance(v, str) else v for k, v in values.items()}


def secret_values(config: Any) -> tuple[str, ...]:
    """Return the values of a configuration that are secret."""
    named = [getattr(config, name, None) for name in SECRETS]
    return tuple({value for value in named if isinstance(value, str) and len(value) >= MIN_CHARACTERS})


def summary(records: list[Record]) -> dict[str, Any] | None:
    """Return the content of error.json for the records of failed ranks; None without records.

    Earlier errors precede later ones, and causes precede their consequences. A killed rank leaves no record: it is
    placed by the other ranks' `lost` entries, at the time of the first.
    """
    order = in_order(records)
    if not order:
        return None
    first, *others = [{key: record[key] for key in SHOWN} for record in order]
    return {**first, "others": others}


def in_order(records: list[Record]) -> list[Record]:
    """Return each failed rank once, the cause first (see `summary`)."""
    own = {record["rank"]: record for record in records}
    named: dict[int, Record] = {}
    for record in records:
        lost = record.get("lost")
        if lost and lost["rank"] not in own:
            other = named.get(lost["rank"])
            if other is None or lost["time"] < other["time"]:
                named[lost["rank"]] = {**lost, "follow_up": False}
    order = sorted([*own.values(), *named.values()], key=lambda r: (r["follow_up"], r["time"], r["rank"]))
    if order:
        speaker = speaker_of(order, order[0])
        order.sort(key=lambda record: record["rank"] != speaker)  # stable sort
    return order


def speaker_of(records: list[Record], one: Record) -> int:
    """Return the rank that reports an error: the first that had it; the lowest of those within SAME_MOMENT_SECONDS."""
    same = [r for r in records if is_same(r, one)]
    begin = min(datetime.fromisoformat(r["time"]) for r in same)
    return min(
        r["rank"] for r in same if (datetime.fromisoformat(r["time"]) - begin).total_seconds() <= SAME_MOMENT_SECONDS
    )


def is_same(one: Record, other: Record) -> bool:
    """Return whether two ranks had the same error."""
    return all(one[key] == other[key] for key in ("kind", "error", "follow_up"))


@dataclass(frozen=True)
class FailureLog:
    """Writes one rank's failure records. It never raises for a failing disk, which would hide the error to report."""

    run_dir: Path
    rank: int
    world_size: int
    secrets: tuple[str, ...] = ()
    may_write: Callable[[], bool] = lambda: True  # False if another start owns the run's folder

    def begin(self) -> None:
        """Remove this rank's records of an earlier start; rank 0 also removes those that no rank of this start can
        have written."""
        with contextlib.suppress(OSError):
            if not self.may_write():
                return
            self._record.unlink(missing_ok=True)
            if self.rank == 0:
                (self.run_dir / run_files.ERROR).unlink(missing_ok=True)
                for path in (self.run_dir / FOLDER).iterdir():
                    number = re.fullmatch(r"rank-(\d+)\.json", path.name)
                    if number is None or int(number.group(1)) >= self.world_size:
                        path.unlink(missing_ok=True)

    def leave(self, error: BaseException) -> None:
        """Write this rank's record, once for each error."""
        if recorded_in(error) is None:
            error._cloze_log = self  # type: ignore[attr-defined]
            record = record_of(error, self.rank, self.secrets, time.time())
            _in_time(lambda: self._write(self._record, record))

    def records(self) -> list[Record]:
        """Return the readable records."""
        found: list[Record] = []
        for path in sorted((self.run_dir / FOLDER).glob("rank-*.json")):
            record = read_mapping(path)
            if {*SHOWN, "follow_up"} <= record.keys():
                found.append(record)
        return found

    def publish(self) -> None:
        """Write error.json from the records, unless it lists this rank already: if a thousand ranks fail, few read
        all."""
        _in_time(self._publish)

    def claim(self, record: Record) -> bool:
        """Return whether this rank reports the error: the first rank that asks does."""
        name = hashlib.sha256(f"{record['kind']} {record['error']}".encode()).hexdigest()[:16]
        try:
            os.close(os.open(self.run_dir / FOLDER / f"told-{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except OSError:  # for example a full disk: report twice rather than never
            return True
        return True

    def count(self) -> int:
        """Return the number of ranks that left a record."""
        try:
            return sum(name.startswith("rank-") and name.endswith(".json") for name in os.listdir(self._record.parent))
        except OSError:
            return 0

    @property
    def _record(self) -> Path:
        return self.run_dir / FOLDER / f"rank-{self.rank:05d}.json"

    def _publish(self) -> None:
        with contextlib.suppress(ClozeError, KeyError, TypeError):
            said = read_json(self.run_dir / run_files.ERROR)
            if self.rank in [said["rank"], *(other["rank"] for other in said["others"])]:
                return
        said = summary(self.records())
        if said is not None:
            self._write(self.run_dir / run_files.ERROR, said)

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        """Write JSON as `files.write_json` does, but with the rank in the temporary name, because process numbers of
        two hosts can be equal. A missing run folder is not created."""
        staged = self.run_dir / FOLDER / f"{self.rank:05d}-{path.name}.tmp-{secrets.token_hex(8)}"
        with contextlib.suppress(OSError):
            if not self.may_write():
                return
            staged.parent.mkdir(exist_ok=True)
            write_new(staged, dump_json(value, indent=2) + "\n")
            sync(staged)
            os.replace(staged, path)


def _in_time(act: Callable[[], None]) -> None:
    """Do it in a thread, and return after DISK_SECONDS at the latest."""
    worker = threading.Thread(target=act, name="failures", daemon=True)
    worker.start()
    worker.join(DISK_SECONDS)


def forget(run_dir: Path) -> None:
    """Remove the records of earlier starts; rank 0 calls it before any rank of this start can fail."""
    with contextlib.suppress(OSError):
        (run_dir / run_files.ERROR).unlink(missing_ok=True)
    remove_tree(run_dir / FOLDER, quietly=True)


def recorded_in(error: BaseException) -> FailureLog | None:
    """Return the log that recorded an error; None if none did."""
    return getattr(error, "_cloze_log", None)
