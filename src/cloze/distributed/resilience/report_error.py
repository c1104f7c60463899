"""Report what ended this process, once per distinct error across ranks.

    code = report_error(error)      # and error.json in the run's folder: `cloze.distributed.resilience.error_records`

Ranks with a common run folder use it to choose the one that reports. Before the folder exists, rank 0 reports; another
rank reports only if rank 0 seems to have no error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
import traceback
from pathlib import Path

from cloze.distributed.resilience.error_records import FailureLog, exit_code_of, is_same, recorded_in, speaker_of
from cloze.errors import ClozeError, DiskError, LostRank, is_common, one_line
from cloze.utils.environment import processes
from cloze.utils.foreign.paths import printable
from cloze.utils.terminal.console import complain, own_rank
from cloze.utils.terminal.json_events import event, is_json
from cloze.utils.terminal.screen import restore

FIRST_WORD_SECONDS = 2.0  # lets rank 0 report first, if it probably has the same error
ELSEWHERE_SECONDS = 5.0  # the same on hosts other than rank 0's, which notice later that rank 0 ended
SETTLE_SECONDS = 1.0  # for the records of ranks that fail together
_POLL_SECONDS = 0.05
_OF_A_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EROFS}


def told_of_a_path(error: Exception) -> Exception:
    """Return a DiskError for an OSError about a path, other errors unchanged. Within a run, errors are recorded
    unchanged."""
    if isinstance(error, OSError) and error.errno in _OF_A_PATH and error.filename and recorded_in(error) is None:
        what, where = f"cannot be used ({os.strerror(error.errno)})", printable(os.fsdecode(error.filename))
        return DiskError(what, where=where, hint="give another path")
    return error


def report_error(error: Exception) -> int:
    """Report what ended this process, once for all ranks, and write error.json; return the exit code.

    A ClozeError is one line. Any other error is a traceback from the rank that had it first, and one line from others.
    """
    error = told_of_a_path(error)
    log, rank, code = recorded_in(error), own_rank(), exit_code_of(error)
    ended = threading.Event()  # the launcher ends all ranks once one is gone, so report first
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
    if isinstance(error, LostRank):
        _tell_of_lost(error, log, rank)
    elif log is None:
        _tell_before_the_run(error, rank, ended)
    else:
        _tell_of_recorded(error, log, ended)
    return code


def is_ours_to_tell(error: LostRank) -> bool:
    """Return whether this process reports a lost rank: rank 0 does; if that one is lost, rank 1 and the first rank of
    each machine do, since machines may not see each other any more."""
    rank = own_rank()
    return rank == 0 or (error.loud and (rank == 1 or processes.local_rank() == 0))


def _tell_of_lost(error: LostRank, log: FailureLog | None, rank: int) -> None:
    """Report a lost rank from rank 0, or from the lowest rank left, and from the first rank of each machine, because a
    broken link may separate machines."""
    speaks = is_ours_to_tell(error)
    if log is not None and rank > 0:
        time.sleep(_turn(rank))
        if error.loud:
            lowest = min((r["rank"] for r in log.records() if r["follow_up"]), default=rank)
            speaks = rank == lowest or processes.local_rank() == 0
    if speaks:
        _speak(error, [])
    if log is not None:
        log.publish()


def _tell_before_the_run(error: Exception, rank: int, ended: threading.Event) -> None:
    """Report an error without a run folder: rank 0 at once, another rank if rank 0 seems to have no error."""
    if rank > 0:
        elsewhere = processes.group_rank() != 0
        if ended.wait(ELSEWHERE_SECONDS if elsewhere else FIRST_WORD_SECONDS) or is_common(error):
            return
    _speak(error, [])


def _tell_of_recorded(error: Exception, log: FailureLog, ended: threading.Event) -> None:
    """Report from the rank that had the error first, for all that had the same."""
    begin = time.monotonic()
    if log.rank > 0:
        ended.wait(_turn(log.rank))
    while log.rank == 0 and log.count() < log.world_size and time.monotonic() - begin < SETTLE_SECONDS:
        time.sleep(_POLL_SECONDS)
    records = log.records()
    own = next((record for record in records if record["rank"] == log.rank), None)
    if own is None:  # it could not be written
        speaks, others = log.rank == 0 or not is_common(error), []
    else:
        others = [r["rank"] for r in records if is_same(r, own) and r["rank"] != log.rank]
        speaks = speaker_of(records, own) == log.rank and log.claim(own)
    if speaks:
        _speak(error, others)
    elif not isinstance(error, ClozeError):
        complain(f"cloze: error: {one_line(error)} (as on rank {speaker_of(records, own) if own else 0})")
    log.publish()
    if not speaks:
        ended.wait(max(0.0, FIRST_WORD_SECONDS - (time.monotonic() - begin)))


def _turn(rank: int) -> float:
    """Return the delay in seconds before a rank other than 0 reads the records; staggered, so that few read them
    all."""
    return min(0.2 + 0.002 * rank, FIRST_WORD_SECONDS)


def _speak(error: Exception, others: list[int]) -> None:
    also = f" (and on {format_ranks(others)})" if others else ""
    if is_json():
        known = isinstance(error, ClozeError)
        event(
            "error",
            what=error.what if isinstance(error, ClozeError) else one_line(error),
            where=error.where if isinstance(error, ClozeError) else None,
            hint=error.hint if isinstance(error, ClozeError) else None,
            kind=type(error).__name__,
            exit_code=exit_code_of(error),
            also_on_ranks=others,
            traceback=None if known else "".join(traceback.format_exception(error)),
        )
        return
    if isinstance(error, ClozeError):
        complain(f"cloze: error: {error}{also}")
        return
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    complain(text + (f"cloze: error: {one_line(error)}{also}" if also else ""))


def format_ranks(numbers: list[int]) -> str:
    """Return rank numbers as text: [1, 2, 3, 7] -> `ranks 1-3, 7`; [1] -> `rank 1`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    texts = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(texts)}"


def leave_code(code: int) -> None:
    """Restore the terminal, and write rank 0's exit code to the file named by CLOZE_EXIT_FILE, because the launcher's
    exit code differs from the ranks'."""
    restore()
    path = os.environ.get("CLOZE_EXIT_FILE")
    if path is not None and own_rank() == 0:
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{code}\n", encoding="utf-8")
