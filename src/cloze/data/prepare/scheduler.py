"""Distribute units over the processes of one machine and the tasks of an array job.

    for documents, tokens in do_units(recipe, tasks, units, num_proc=8, share=WorkerShard(3, 16), ...):

Units are independent, and one rename publishes each. So processes on several machines may work on the same folder, and
any of them may be killed and restarted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any

from cloze.data.corpus.fields import BadRecord, Document, Fields
from cloze.data.corpus.formats import Raw
from cloze.data.corpus.sources import Task, document_of
from cloze.data.prepare.unit import Recipe, do_unit, read_unit, unit_name
from cloze.data.tokenizers.encoders import Encoder
from cloze.errors import DataError
from cloze.utils.terminal.console import progress

POLL_SECONDS = 0.5
SIGNAL_SECONDS = 1.0  # within this time a scheduler's signal has reached all processes of a job
_MEGABYTE = 10**6


@dataclass(frozen=True)
class WorkerShard:
    """The units of one of `count` array tasks: those numbered `index`, `index + count`, ..."""

    index: int = 0
    count: int = 1

    def has(self, number: int) -> bool:
        """Return whether unit or file `number` belongs to the share."""
        return number % self.count == self.index


@dataclass(frozen=True)
class Job:
    """One unit to make. `records`: a chunk of a stream; None: the task's own pieces."""

    task: Task
    chunk: int
    records: list[tuple[int, Raw]] | None
    is_last: bool


def missing_units(tasks: list[Task], units: Path) -> list[tuple[Task, int]]:
    """Return (task, chunk) of every missing unit; of a stream only the first."""
    missing = []
    for task in tasks:
        chunk, facts = 0, read_unit(units / unit_name(task.number, 0))
        while facts is not None and not facts["last"]:
            chunk += 1
            facts = read_unit(units / unit_name(task.number, chunk))
        if facts is None:
            missing.append((task, chunk))
    return missing


def owners(tasks: list[Task], missing: list[tuple[Task, int]], count: int) -> list[int]:
    """Return the array tasks that would make the missing units."""
    by_file = _streams_by_file(tasks, count)
    streams = [task.number for task in tasks if task.stream is not None]
    return sorted(
        {
            task.number % count
            if task.stream is None
            else (streams.index(task.number) + (0 if by_file else chunk)) % count
            for task, chunk in missing
        }
    )


def do_units(
    recipe: Recipe, tasks: list[Task], units: Path, num_proc: int, share: WorkerShard, unit_bytes: int
) -> None:
    """Make this share's missing units, with a progress bar. Raises DataError or DiskError."""
    jobs = _jobs(recipe.fields, tasks, units, share, unit_bytes)
    mine = [task for task in tasks if task.stream is not None or share.has(task.number)]
    done = [task for task in mine if read_unit(units / unit_name(task.number, 0)) and task.stream is None]
    sizes = [task.size for task in mine]
    total = None if None in sizes else sum(size or 0 for size in sizes) // _MEGABYTE
    tracker = _Tracker(mine)
    with progress("prepare", total=total, unit="MB", start=sum(task.size or 0 for task in done) // _MEGABYTE) as bar:
        tracker.show = bar
        if num_proc == 1 or (len(mine) == 1 and mine[0].stream is None):
            encode = Encoder(recipe.encoder)
            for job in jobs:
                do_unit(recipe, encode, units, job.task, job.chunk, job.records, job.is_last, tracker.count)
                tracker.finish(job)
        else:
            _do_in_processes(recipe, jobs, units, num_proc, tracker)


class _Tracker:
    """Sums and shows the progress of units."""

    def __init__(self, tasks: list[Task]):
        self._tasks = tasks
        self._begin = self._shown_at = time.monotonic()
        self.documents = self.tokens = self._bytes = self._shown = 0
        self.show: Callable[..., None] = lambda *a, **k: None

    def count(self, documents: int, tokens: int) -> None:
        """Count finished documents of a unit."""
        self.documents += documents
        self.tokens += tokens
        self.refresh()

    def finish(self, job: Job) -> None:
        """Count a finished unit."""
        if job.records is None or job.is_last:
            self._bytes += job.task.size or 0
        self.refresh()

    def refresh(self) -> None:
        """Show the progress, at most every POLL_SECONDS."""
        now = time.monotonic()
        if now - self._shown_at < POLL_SECONDS:
            return
        self._shown_at = now
        read = self._bytes + sum(task.meter.bytes_read() for task in self._tasks if task.meter is not None)
        shown = read // _MEGABYTE
        seconds = now - self._begin
        rates = f"{self.documents / seconds:,.0f} documents/s  {self.tokens / seconds:,.0f} tokens/s"
        self.show(shown - self._shown, note=f"{self.documents:,} documents  {rates}")
        self._shown = shown


def _jobs(fields: Fields, tasks: list[Task], units: Path, share: WorkerShard, unit_bytes: int) -> Iterator[Job]:
    """Yield the missing units of a share."""
    by_file = _streams_by_file(tasks, share.count)
    streams = 0
    for task in tasks:
        if task.stream is None:
            if share.has(task.number) and read_unit(units / unit_name(task.number, 0)) is None:
                yield Job(dataclasses.replace(task, meter=None), 0, None, True)
            continue
        number, streams = streams, streams + 1
        if (by_file and not share.has(number)) or not missing_units([task], units):
            continue
        bare = dataclasses.replace(task, stream=None, meter=None)
        for chunk, (records, is_last) in enumerate(chunks_of(task, fields, unit_bytes)):
            is_mine = by_file or share.has(number + chunk)
            if is_mine and read_unit(units / unit_name(task.number, chunk)) is None:
                yield Job(bare, chunk, records, is_last)


def _streams_by_file(tasks: list[Task], count: int) -> bool:
    """Return whether each stream is read by one array task only: if there are enough streams for all tasks."""
    return sum(task.stream is not None for task in tasks) >= count


def chunks_of(task: Task, fields: Fields, unit_bytes: int) -> Iterator[tuple[list[tuple[int, Raw]], bool]]:
    """Cut a stream's records into chunks of about `unit_bytes`, at least one; yield each, and whether it is last."""
    assert task.stream is not None
    chunk: list[tuple[int, Raw]] = []
    held = 0
    for position, raw in task.stream():
        if held >= unit_bytes:
            yield chunk, False
            chunk, held = [], 0
        if isinstance(raw, dict):
            try:
                raw = document_of(raw, fields)
            except BadRecord as error:
                raw = error
        held += len(raw) if isinstance(raw, bytes) else len(raw.text) if isinstance(raw, Document) else 0
        chunk.append((position, raw))
    yield chunk, True


def start_method() -> Any:
    """Return how worker processes start: forked from a server that has imported only what they need.

    A fork of this process would copy thread pools that no longer run, and a fresh interpreter takes a second. The
    server starts in the background, so call this early. A process forked from one with a server can neither use nor
    replace that server: its workers are fresh interpreters.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cloze.data.prepare.scheduler", "cloze.data.prepare.preload"])
    with contextlib.suppress(ImportError):
        from multiprocessing.forkserver import ensure_running

        try:
            ensure_running()
        except ChildProcessError:
            return multiprocessing.get_context("spawn")
    return context


def _do_in_processes(recipe: Recipe, jobs: Iterator[Job], units: Path, num_proc: int, tracker: _Tracker) -> None:
    context = start_method()
    counts = context.Array("q", 2)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(num_proc, context, initializer=_start_worker, initargs=(recipe, units, counts))
    running: dict[Future[None], Job] = {}
    try:
        more = True
        while more or running:
            while more and len(running) < num_proc + 1:
                job = next(jobs, None)
                if job is None:
                    more = False
                else:
                    running[pool.submit(_do_job, job)] = job
            ended, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in ended:
                future.result()
                job = running.pop(future)
                tracker.finish(dataclasses.replace(job, records=None if job.records is None else []))
            tracker.documents, tracker.tokens = counts[0], counts[1]
            tracker.refresh()
        pool.shutdown()
    except BrokenProcessPool:
        time.sleep(SIGNAL_SECONDS)  # raises Stopped if the worker was ended by a request to stop this process too
        raise DataError(
            "a worker process was killed, probably for want of memory",
            where="--num_proc",
            hint="what is finished is kept; continue with fewer processes",
        ) from None
    finally:
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        pool.shutdown(wait=False, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(recipe: Recipe, units: Path, counts: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # all processes get them; the first ends the others
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(recipe=recipe, units=units, counts=counts, encode=Encoder(recipe.encoder))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_end([parent.sentinel])
        os._exit(1)


def _do_job(job: Job) -> None:
    counts = _worker["counts"]

    def advance(documents: int, tokens: int) -> None:
        with counts.get_lock():
            counts[0] += documents
            counts[1] += tokens

    do_unit(
        _worker["recipe"], _worker["encode"], _worker["units"], job.task, job.chunk, job.records, job.is_last, advance
    )
