"""Detect a dead or hanging rank within seconds, and report which it is, where, and in which phase.

A collective operation waits for a dead rank until its time-out, half an hour by default. So every rank keeps a
connection to rank 0, apart from the process group, and sends its state each second. If a process dies, the kernel
closes its connection at once. A lost machine or cable is detected after a minute, or after the collectives' time-out
if that is shorter, on both sides. The survivors report one line and end.

    with Watch(rank, world_size, hang_timeout=600, ddp_timeout=1800, log=FailureLog(run_dir, ...)) as watch:
        with watch.phase("evaluate"): ...
        watch.step = 120        # any of these is a sign of progress

After `hang_timeout` seconds without progress, all ranks write their threads' stacks to files and end. Unless it exits
cleanly, a rank writes a failure record (see `cloze.distributed.resilience.error_records`) once the run's folder
exists.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloze.distributed.collectives import gather, run_on_main_and_broadcast
from cloze.distributed.resilience.error_records import FailureLog, is_lost_connection, is_unanswered, lost_record
from cloze.distributed.resilience.joining import accept_ranks, join_main, listen, resolve
from cloze.distributed.resilience.json_socket import Link
from cloze.distributed.resilience.report_error import leave_code, report_error
from cloze.distributed.resilience.stack_dump import STACKS, waits_for_others, write_stacks
from cloze.errors import ClozeError, LostRank, Stopped, one_line, phase_of, tag_phase
from cloze.utils.environment import processes
from cloze.utils.heartbeat import Progress, beat, beats
from cloze.utils.terminal.console import warn

INTERVAL_SECONDS = 1.0
SILENT_SECONDS = 60.0  # a rank that sends nothing for so long is lost; at most --ddp_timeout
CONNECT_SECONDS = 20.0
GRACE_SECONDS = 5.0  # time for the main thread to leave a collective by itself


class Watch:
    """Watches one rank; with one rank only for hangs. Time-outs are in seconds. `is_open`: the run's folder exists."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        hang_timeout: int | None,
        ddp_timeout: int,
        log: FailureLog,
        is_open: bool = False,
    ):
        self.rank, self.world_size, self.host = rank, world_size, socket.gethostname()
        self._hang_timeout, self._ddp_timeout = hang_timeout, ddp_timeout
        self._log, self._is_open = log, is_open
        self._stacks = log.run_dir / STACKS
        self._phase, self._step, self._progress = "start", 0, Progress()
        self._links: dict[int, Link] = {}
        self._lost: LostRank | None = None
        self._noticed, self._ended = threading.Event(), threading.Event()
        self._lock = threading.Lock()

    @property
    def step(self) -> int:
        """Return the number of steps done."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step = value
        self.beat()

    @property
    def doing(self) -> tuple[str, int]:
        """Return the current phase and the number of steps done."""
        return self._phase, self._step

    def beat(self) -> None:
        """Record a sign of progress, as `heartbeat.beat` does."""
        beat()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Set the phase of this rank within the block."""
        before = self._phase
        self._enter(name)
        try:
            yield
        except Exception as error:
            tag_phase(error, name, self._step)
            raise
        self._enter(before)  # skipped after an error, which belongs to that phase

    def enable_error_log(self, run_dir: Path) -> Path:
        """Write failure records to the run's folder from now on."""
        self._is_open = True
        return run_dir

    def _enter(self, name: str) -> None:
        self._phase = name
        self.beat()
        self._tell()

    def __enter__(self) -> Watch:
        if self.world_size > 1:
            self._connect()
        threading.Thread(target=self._keep_watch, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        """Send this rank's end or error; an error caused by another rank's end becomes one line about that rank."""
        if error is None or isinstance(error, Stopped):
            self._end("bye")
            return
        tag_phase(error, *self.doing)
        if isinstance(error, KeyboardInterrupt):
            self._end("failed", error, "interrupted", 130)
            return
        if self._comes_from_another(error):
            assert self._lost is not None
            self._end("bye")
            tag_phase(self._lost, *phase_of(error))
            self._keep(self._lost)
            raise self._lost from None
        if self.world_size > 1 and is_unanswered(error):
            lost = self._unanswered()
            tag_phase(lost, *phase_of(error))
            self._keep(lost)
            self._end("failed", lost, str(lost), lost.exit_code)
            raise lost from error
        self._keep(error)
        self._end("failed", error, one_line(error), error.exit_code if isinstance(error, ClozeError) else 1)

    def _comes_from_another(self, error: BaseException) -> bool:
        """Return whether an error is a consequence of another rank's end, unless both had the same error. A broken
        connection may be noticed before the watch receives its cause."""
        if isinstance(error, ClozeError) or self.world_size == 1:
            return False
        line = one_line(error)
        heard = self._noticed.wait(GRACE_SECONDS / 2 if is_lost_connection(line) else GRACE_SECONDS / 10)
        lost = self._lost.lost if heard and self._lost is not None else None
        return heard and (lost is None or lost["error"] != line)

    def _unanswered(self) -> LostRank:
        """Return the error for a collective without an answer although all known ranks are alive."""
        now = time.monotonic()
        others = [
            f"rank {rank} on {link.about['host']}, {now - link.heard:.0f} s ago, in {link.about['phase']}, "
            f"step {link.about['step']}"
            for rank, link in sorted(self._links.items())
        ]
        line = (
            f"rank {self.rank} on {self.host} got no answer from other ranks in {self._phase}, step {self._step} "
            f"(--ddp_timeout {self._ddp_timeout}); last heard: {'; '.join(others) or 'no rank'}"
        )
        return LostRank(line, loud=True)

    def _keep(self, error: BaseException) -> None:
        if self._is_open:
            self._log.leave(error)

    def _end(self, kind: str, error: BaseException | None = None, line: str | None = None, code: int = 0) -> None:
        self._ended.set()
        about = self._where()
        if error is not None:
            about["phase"], step = phase_of(error)
            about |= {"step": self._step if step is None else step, "class": type(error).__name__}
        for link in self._links.values():
            link.send({"kind": kind, "rank": self.rank, "line": line, "code": code, **about})

    def _tell(self) -> None:
        count = self._progress.total if self.rank == 0 else beats(threading.main_thread())
        for link in self._links.values():
            link.send({"kind": "alive", "beats": count, **self._where()})

    def _where(self) -> dict[str, Any]:
        return {"host": self.host, "phase": self._phase, "step": self._step}

    def _connect(self) -> None:
        """Connect the ranks to rank 0, which listens; every rank calls it."""
        host, own, hosts = processes.master()[0], resolve(processes.master()[0]), gather(self.host)
        one_host = processes.is_one_host() and len(set(hosts)) == 1
        addresses = list(dict.fromkeys(address for one in gather(own) for address in one))
        server, address = None, ""
        if self.rank == 0:
            server, address = listen(["127.0.0.1"] if one_host else addresses)
        here = server.getsockname()[1] if server is not None else 0
        port, address, word = run_on_main_and_broadcast(lambda: (here, address, secrets.token_hex(32)))
        key = word.encode() + (processes.secret() or "").encode()
        try:
            if server is not None:
                with server:
                    found = accept_ranks(server, key, self.world_size, CONNECT_SECONDS)
                self._links = {rank: Link(connection) for rank, connection in found.items()}
                if len(found) < self.world_size - 1:
                    raise TimeoutError(f"{self.world_size - 1 - len(found)} did not connect")
            else:
                places = [*([address] if address else []), *own, host]
                self._links[0] = Link(join_main(places, port, key, self.rank, self.world_size, CONNECT_SECONDS))
        except OSError as error:
            warn(f"ranks cannot watch each other ({error}); a dead one is noticed at --ddp_timeout only", True)
        for rank, link in self._links.items():
            link.about = {"host": hosts[rank], "phase": "start", "step": 0}
            threading.Thread(target=self._listen, args=(rank, link), name=f"watch-{rank}", daemon=True).start()

    def _listen(self, rank: int, link: Link) -> None:
        """Receive one rank's messages until it ends."""
        while (said := link.receive()) is not None:
            kind = said.pop("kind", "alive")
            link.heard = time.monotonic()
            if kind == "alive":
                self._progress.update(rank, said.pop("beats", 0))  # a rank that waits for it makes progress too
                link.about = said
            elif kind == "bye":
                link.gone = True
                return
            elif kind == "lost":
                self._notice(LostRank(said["line"], exit_code=said["code"], lost=said["lost"]), pass_on=False)
                return
            elif kind == "hang":
                self._notice(LostRank(said["line"], exit_code=said["code"]), pass_on=self.rank == 0, dump=True)
                return
            elif kind == "failed":
                line = f"rank {rank} on {said['host']} failed in {said['phase']}, step {said['step']}: {said['line']}"
                lost = lost_record(rank, said, said["line"], said["class"], said["code"], time.time())
                self._notice(LostRank(line, exit_code=said["code"], lost=lost))
                return
        if not link.gone:
            self._notice(self._about(rank, link, "died", time.time()))

    def _about(self, rank: int, link: Link, what: str, when: float) -> LostRank:
        about = link.about
        line = f"rank {rank} on {about['host']} {what} in {about['phase']}, step {about['step']}"
        return LostRank(
            line,
            hint="--resume_from_checkpoint auto resumes from the last checkpoint",
            loud=rank == 0,
            lost=lost_record(rank, about, line, LostRank.__name__, LostRank.exit_code, when),
        )

    def _notice(self, lost: LostRank, pass_on: bool = True, dump: bool = False) -> None:
        """Handle a lost rank: inform the others, and end this process unless its main thread ends by itself."""
        with self._lock:
            if self._ended.is_set() or self._noticed.is_set():
                return
            self._lost = lost
            self._noticed.set()
        if self.rank == 0 and pass_on:
            kind = "hang" if dump else "lost"
            message = {"kind": kind, "line": str(lost), "code": lost.exit_code, "lost": lost.lost}
            for link in self._links.values():
                link.send(message)
        if dump:
            write_stacks(self._stacks, self.rank, f"rank {self.rank} on {self.host}, {self._phase}, step {self._step}")
            lost.lost = self._own_hang()
        elif self._ended.wait(GRACE_SECONDS):
            return
        tag_phase(lost, *self.doing)
        self._keep(lost)
        code = report_error(lost)
        leave_code(code)
        os._exit(code)

    def _own_hang(self) -> dict[str, Any]:
        """Return this rank's record of a hang: a cause unless it waits for others; as old as its last progress."""
        silent = time.monotonic() - self._progress.when
        waits = self.world_size > 1 and waits_for_others()
        line = f"no progress for {silent:.0f} s (--hang_timeout)" + (", waiting for other ranks" if waits else "")
        about = lost_record(
            self.rank, self._where(), line, LostRank.__name__, LostRank.exit_code, time.time() - silent
        )
        return {**about, "follow_up": waits}

    def _keep_watch(self) -> None:
        silence = min(SILENT_SECONDS, self._ddp_timeout)
        while not self._ended.wait(INTERVAL_SECONDS):
            self._tell()
            for rank, link in self._links.items():
                if not link.gone and time.monotonic() - link.heard > silence:
                    heard = time.time() - (time.monotonic() - link.heard)
                    self._notice(self._about(rank, link, f"said nothing for {silence:.0f} s", heard))
            self._progress.update(self.rank, beats(threading.main_thread()))
            waited = time.monotonic() - self._progress.when
            if self._hang_timeout is not None and waited > self._hang_timeout:
                line = (
                    f"no progress for {self._hang_timeout} s (--hang_timeout) on rank {self.rank} on {self.host} in "
                    f"{self._phase}, step {self._step}; the stacks of all ranks are in {self._stacks}"
                )
                lost = LostRank(line)
                if self.rank != 0 and 0 in self._links:
                    self._links[0].send({"kind": "hang", "line": str(lost), "code": lost.exit_code})
                    if self._noticed.wait(GRACE_SECONDS):
                        return
                self._notice(lost, dump=True)
