"""Where the processes meet: one key-value store, which needs a connection to rank 0 and no other.

It works if collectives do not: a process that cannot reach rank 0 reports it, and rank 0 continues with the others.

    meeting = join(process, timeout=60)
    meeting.tell("facts", {...}); meeting.ask(rank=3, what="facts")
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from cloze.distributed.secret import authenticate, check_secret, without_secret
from cloze.errors import LaunchError
from cloze.tools.doctor.this_process import ThisProcess
from cloze.utils.environment import processes
from cloze.utils.foreign.json_yaml import parse_json
from cloze.utils.terminal.console import warn

LOOK_SECONDS = 0.02
CLOCK_ROUND_TRIPS = 10
TURN_SECONDS = 5.0
LONGEST_SECONDS = 3600.0  # rank 0 may wait for others; if it dies, the connection is lost at once
INTERFACES = "MASTER_ADDR chooses the network here, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME for what follows"


@dataclass
class Meeting:
    """This process's access to the store. `ranks`: those who take part, in order; `silent`, on rank 0: those who did
    and then said nothing any more."""

    process: ThisProcess
    store: Any
    timeout: float
    ranks: list[int] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)

    def tell(self, what: str, value: Any) -> None:
        """Put a JSON value there under this rank's name."""
        with _connected(self.process):
            self.store.set(f"{what}/{self.process.rank}", json.dumps(value))

    def ask(self, rank: int, what: str, seconds: float | None = None) -> Any:
        """Return what that rank answers; None without an answer within `seconds` (default: the timeout).

        Looks again and again, so that Ctrl-C is heard. Raises LaunchError if rank 0 is gone.
        """
        end = time.monotonic() + (self.timeout if seconds is None else seconds)
        key = f"{what}/{rank}"
        with _connected(self.process):
            while not self.store.check([key]):
                if time.monotonic() > end:
                    return None
                time.sleep(LOOK_SECONDS)
            return parse_json(self.store.get(key), f"rank {rank}", kind=object, error=LaunchError)

    def gather(self, what: str, value: Any) -> dict[int, Any]:
        """Return, on rank 0, the answer of each rank, None for one that does not answer in time, which is added to the
        silent ranks; elsewhere {}."""
        self.tell(what, value)
        if self.process.rank:
            return {}
        end = time.monotonic() + self.timeout
        answers = {rank: self.ask(rank, what, end - time.monotonic()) for rank in self.ranks}
        self.silent += [rank for rank, one in answers.items() if one is None and rank not in self.silent]
        return answers

    def decide(self, what: str, choose: Callable[[], Any]) -> Any:
        """Return rank 0's choice on every rank. Raises LaunchError if rank 0 does not answer."""
        if self.process.rank == 0:
            self.tell(what, choose())
        chosen = self.ask(0, what, LONGEST_SECONDS)
        if chosen is None:
            raise LaunchError(
                "rank 0 does not answer any more",
                where=self.process.say(),
                hint="look at the log of rank 0, and start again",
            )
        return chosen


@contextlib.contextmanager
def _connected(process: ThisProcess) -> Iterator[None]:
    """Turn a lost connection to the store into one line."""
    try:
        yield
    except RuntimeError as error:  # all of torch.distributed's errors are
        what = f"lost the connection to rank 0 ({process.head}:{process.port}): {str(error).splitlines()[0]}"
        raise LaunchError(
            what, where=process.say(), hint="look at the log of rank 0, and at the network between the two"
        ) from None


def join(process: ThisProcess, timeout: float) -> Meeting:
    """Meet the other processes within `timeout` seconds, agree on who came, and prove to each other that they know
    CLOZE_SECRET, as in training.

    Raises LaunchError, naming both ends, if rank 0 cannot be reached, and on rank 0 if its port is in use.
    """
    secret = check_secret(processes.secret())
    end = time.monotonic() + timeout
    serves = process.rank == 0 and not process.served
    if not serves:
        knock(process, end, timeout)
    meeting = Meeting(process, open_store(process, serves, timeout), timeout)
    meeting.tell("here", socket.gethostname())
    if process.rank == 0:
        came = [r for r in range(process.world_size) if meeting.ask(r, "here", end - time.monotonic()) is not None]
        meeting.ranks = came
        meeting.tell("roster", came)
    else:
        # Rank 0 waits for the slowest rank, and may itself have started that much later.
        roster = meeting.ask(0, "roster", 2 * timeout)
        meeting.ranks = roster if isinstance(roster, list) else []
        if process.rank not in meeting.ranks:
            what = f"came too late for rank 0 on {process.head}, which waited {timeout:.0f} s"
            raise LaunchError(what, where=process.say(), hint="give a longer --timeout")
    known = authenticate(meeting.store, process.rank, process.world_size, secret, timeout, meeting.ranks)
    if not known and len({meeting.ask(rank, "here") for rank in meeting.ranks}) > 1:
        warn(without_secret(f"{process.head}:{process.port}"))
    return meeting


def knock(process: ThisProcess, end: float, timeout: float) -> None:
    """Try to connect to rank 0 until time is up, and tell apart what torch reports in one word: no such name, nobody
    listens, no answer. Raises LaunchError."""
    while True:
        try:
            address = socket.getaddrinfo(process.head, process.port, type=socket.SOCK_STREAM)[0][4]
            left = max(0.1, min(5.0, end - time.monotonic()))
            socket.create_connection((process.head, process.port), timeout=left).close()
            return
        except socket.gaierror as error:
            why, hint = f"its name is not known here ({error.strerror})", "put it into DNS or /etc/hosts"
        except ConnectionRefusedError:
            why = f"no process listens at {address[0]} port {process.port} (or a firewall refuses)"
            hint = f"did rank 0 start there? else open the port between the nodes; {INTERFACES}"
        except OSError as error:
            why = f"no answer from {address[0]} port {process.port} ({error.strerror or error})"
            hint = f"a firewall, or the wrong network: open the port between the nodes; {INTERFACES}"
        if time.monotonic() > end:
            what = f"cannot reach rank 0 on {process.head}:{process.port} within {timeout:.0f} s: {why}"
            raise LaunchError(what, where=process.say(), hint=hint)
        time.sleep(0.1)


def open_store(process: ThisProcess, serves: bool, timeout: float) -> Any:
    """Return torch's TCPStore with a prefix for Cloze's keys. Raises LaunchError if it cannot be opened."""
    from torch.distributed import DistError, PrefixStore, TCPStore

    seconds = timedelta(seconds=max(1.0, timeout))
    try:
        store = TCPStore(process.head, process.port, None, serves, seconds, wait_for_workers=False)
    except (DistError, RuntimeError) as error:
        where, line = process.say(), str(error).splitlines()[0]
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            hint = "something else runs there: set MASTER_PORT to a free port on all nodes"
            raise LaunchError(f"port {process.port} is taken", where=where, hint=hint) from None
        what = f"what listens on {process.head}:{process.port} is not rank 0 of this job ({line})"
        raise LaunchError(what, where=where, hint="set MASTER_PORT to a free port on all nodes") from None
    return PrefixStore(f"cloze-doctor/{processes.restart_count()}", store)


def compare_clocks(meeting: Meeting, leaders: list[int]) -> dict[int, dict[str, float] | None]:
    """Return, on rank 0, how far the clock of each of `leaders` is ahead of rank 0's.

    As NTP does (RFC 5905): rank r sends at t0 and has the answer at t1, in which rank 0 put its own time t; so r is
    ahead by (t0 + t1) / 2 - t, wrong by (t1 - t0) / 2 at most. The quickest of 10 round trips counts, in ms.
    """
    process, store = meeting.process, meeting.store
    others = [rank for rank in leaders if rank != 0]
    if process.rank == 0:
        for rank in others:
            store.set(f"clock/{rank}/turn", "")
            for number in range(CLOCK_ROUND_TRIPS):
                if not _until_set(store, f"clock/{rank}/{number}", TURN_SECONDS):
                    break
                store.set(f"clock/{rank}/{number}/head", repr(time.time()))
        return {rank: meeting.ask(rank, "clock", TURN_SECONDS) for rank in others}
    if process.rank in others:
        end = time.monotonic() + meeting.timeout + TURN_SECONDS * len(others)
        while not store.check([f"clock/{process.rank}/turn"]) and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
        trips = []
        for number in range(CLOCK_ROUND_TRIPS):
            begin = time.time()
            store.set(f"clock/{process.rank}/{number}", "")
            if not _until_set(store, f"clock/{process.rank}/{number}/head", TURN_SECONDS):
                return {}
            arrived, head = time.time(), float(store.get(f"clock/{process.rank}/{number}/head"))
            trips.append(((arrived - begin) / 2 * 1000, ((begin + arrived) / 2 - head) * 1000))
        error_ms, ahead_ms = min(trips)
        meeting.tell("clock", {"ahead_ms": ahead_ms, "error_ms": error_ms})
    return {}


def _until_set(store: Any, key: str, seconds: float) -> bool:
    """Ask for a key without a pause between: a pause would count as time on the way."""
    end = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > end:
            return False
    return True


def part(meeting: Meeting, code: int) -> int:
    """Leave together: rank 0, whose store the others use, goes last. Returns rank 0's exit code for all."""
    if meeting.process.rank == 0:
        meeting.tell("end", code)
        for rank in meeting.ranks[1:]:
            meeting.ask(rank, "left", 5)
        return code
    code = meeting.ask(0, "end", LONGEST_SECONDS)
    meeting.tell("left", True)
    return 2 if code is None else int(code)
