"""How fast two ranks talk to each other: each pair by itself, so that a pair that cannot harms no other.

A pair is a process group of two. Small messages there and back give the latency, one large message each way the
bandwidth. gloo is measured in a thread; NCCL, which can hang, in a child process.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from datetime import timedelta
from functools import partial
from typing import Any

from cloze.tools.doctor.meeting import LOOK_SECONDS, Meeting, open_store
from cloze.tools.doctor.this_process import ThisProcess
from cloze.utils.environment.processes import device_index
from cloze.utils.foreign.json_yaml import parse_json

PAIR_SECONDS = 15.0
GLOO_TRIES = 5  # it tries to connect so often, each time for its time-out (torch 2.13: 10 s of 2, 25 s of 5)
START_SECONDS = 60.0  # a child process that imports torch and starts CUDA on a cold file system
ROUND_TRIPS = 50
LARGE_MESSAGES = 3
ALONE_LIMIT = 16  # up to this many ranks, pairs are measured one at a time

Pair = tuple[int, int]


def measured_ranks(ranks: list[int], hosts: dict[int, str]) -> list[int]:
    """Return all ranks if they are few, else the first one of each host, or the first 16 of a single host."""
    if len(ranks) <= ALONE_LIMIT or len(set(hosts.values())) == 1:
        return ranks[:ALONE_LIMIT]
    return [rank for rank in ranks if rank == min(other for other in ranks if hosts[other] == hosts[rank])]


def schedule(ranks: list[int]) -> list[list[Pair]]:
    """Return rounds of pairs: every two ranks meet once, and no rank is in two pairs of a round.

    Up to 16 ranks one pair at a time; above, a round-robin tournament by the circle method: one stays, the others go
    around, n - 1 rounds for n ranks (n for an odd number).
    """
    if len(ranks) <= ALONE_LIMIT:
        return [[(a, b)] for position, a in enumerate(ranks) for b in ranks[position + 1 :]]
    seats: list[int | None] = [*ranks] if len(ranks) % 2 == 0 else [*ranks, None]
    half, rounds = len(seats) // 2, []
    for _ in range(len(seats) - 1):
        met = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in met if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def measure_links(
    meeting: Meeting, rounds: list[list[Pair]], backend: str, megabytes: int, apart: bool
) -> list[dict[str, Any]]:
    """Measure every pair. Rank 0 returns their `ranks`, `latency_us` and `gb_per_second` [there, back], or `error`.

    Bandwidth in 10^9 bytes a second; latency is half a round trip, the mean of the quicker half of 50. `apart`: in a
    child process, which is killed if it does not end.
    """
    process, seconds = meeting.process, min(PAIR_SECONDS, meeting.timeout)
    if any(process.rank in pair for pairs in rounds for pair in pairs):
        arguments = (process, rounds, backend, megabytes, seconds)
        if not apart:
            worker: Any = threading.Thread(target=_run_rounds, args=(meeting.store, *arguments), daemon=True)
        else:
            worker = multiprocessing.get_context("spawn").Process(target=_run_apart, args=arguments, daemon=True)
        worker.start()
        end = time.monotonic() + START_SECONDS * apart + (1 + len(rounds)) * 2 * seconds
        try:
            while worker.is_alive() and time.monotonic() < end:
                worker.join(LOOK_SECONDS)
        finally:
            if apart:
                worker.kill()
    meeting.tell(f"done-{backend}", True)
    if process.rank:
        return []
    end = time.monotonic() + 2 * seconds  # this one was in every round, and waited for the others there
    for rank in {rank for pairs in rounds for pair in pairs for rank in pair}:
        meeting.ask(rank, f"done-{backend}", end - time.monotonic())
    return [_result(meeting.store, backend, pair) for pairs in rounds for pair in pairs]


def _run_apart(process: ThisProcess, rounds: list[list[Pair]], backend: str, megabytes: int, seconds: float) -> None:
    """Measure in a child process, so that NCCL cannot end this one at a time-out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent ends it
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    _run_rounds(open_store(process, False, START_SECONDS), process, rounds, backend, megabytes, seconds)
    os._exit(0)  # groups are left to the operating system, as in cloze.cli.command_line.leave


def _run_rounds(
    store: Any, process: ThisProcess, rounds: list[list[Pair]], backend: str, megabytes: int, seconds: float
) -> None:
    """Measure this rank's pairs, round by round; a round is over when each of its pairs has a result."""
    groups = []  # kept: taking a gloo group down can abort the interpreter
    gone: set[int] = set()
    store.add(f"ready-{backend}", 1)
    members = {rank for pairs in rounds for pair in pairs for rank in pair}
    _until(lambda: store.add(f"ready-{backend}", 0) >= len(members), START_SECONDS)
    for pairs in rounds:
        for pair in pairs:
            if process.rank in pair:
                found = {"error": f"rank {sum(pair) - process.rank} said nothing"}
                if gone.isdisjoint(pair):
                    try:
                        groups.append(open_pair(store, pair, process, backend, seconds))
                        device = "cpu" if backend == "gloo" else f"cuda:{own_device(process)}"
                        found = _measure_pair(groups[-1], process.rank == pair[0], device, megabytes, seconds)
                    except Exception as error:  # any error is the result of this pair
                        found = {"error": _plainly(error)}
                        if backend == "nccl" and groups:
                            groups[-1].abort()  # else what hangs on the GPU holds up every pair after it
                store.set(_key(backend, pair, process.rank), json.dumps(found))
        awaited = {rank: _key(backend, pair, rank) for pair in pairs for rank in pair if rank not in gone}
        _until(partial(store.check, list(awaited.values())), 2 * seconds)
        gone |= {rank for rank, key in awaited.items() if not store.check([key])}


def _key(backend: str, pair: Pair, rank: int) -> str:
    """Return the key under which a rank reports its pair."""
    return f"{backend}/{pair[0]}-{pair[1]}/{rank}"


def open_pair(store: Any, pair: Pair, process: ThisProcess, backend: str, seconds: float) -> Any:
    """Return a process group of these two ranks, with interfaces and time-out as in training."""
    import torch
    from torch.distributed import PrefixStore

    own = PrefixStore(f"pair-{backend}/{pair[0]}-{pair[1]}", store)
    number, limit = pair.index(process.rank), timedelta(seconds=seconds)
    if backend == "gloo":
        return torch.distributed.ProcessGroupGloo(own, number, 2, limit / GLOO_TRIES)
    torch.cuda.set_device(own_device(process))
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = limit
    return torch.distributed.ProcessGroupNCCL(own, number, 2, options)


def own_device(process: ThisProcess) -> int:
    """Return the index of this process's GPU among the visible ones."""
    import torch

    return device_index(process.local_rank, torch.cuda.device_count())


def _plainly(error: Exception) -> str:
    """Return its message without the locations in torch's source."""
    text = re.sub(r"\[?[\w./-]+\.(h|cc|cpp|cu|py):\d+\]?", "", str(error))
    return " ".join(text.split())[:200] or type(error).__name__


def _measure_pair(group: Any, first: bool, device: str, megabytes: int, seconds: float) -> dict[str, Any]:
    """Measure one pair: both sides take the same steps in turn, and the first one measures the time."""
    import torch

    limit, other = timedelta(seconds=seconds), int(first)  # `other`: the peer's number in the pair
    small = torch.zeros(1, dtype=torch.int64, device=device)
    large = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)

    def trip(there: Any, back: Any) -> float:
        """Return the seconds from the first side's send until it has the answer."""
        begin = time.perf_counter()
        for tensor, sends in ((there, first), (back, not first)):
            work = (group.send if sends else group.recv)([tensor], other, 0)
            if device == "cpu":
                work.wait(limit)
            else:
                _wait_on_gpu(work, seconds)
        return time.perf_counter() - begin

    trip(small, small)  # connections are made at the first message
    times = LARGE_MESSAGES if trip(large, large) < 1 else 1
    around = sorted(trip(small, small) for _ in range(ROUND_TRIPS))[: ROUND_TRIPS // 2]
    latency = sum(around) / len(around) / 2
    there = min(trip(large, small) for _ in range(times))
    back = min(trip(small, large) for _ in range(times))
    size = (megabytes << 20) / 1e9
    # Without the small answer's way; on a busy machine that may seem as long as all of it.
    speeds = [size / max(whole - around[0] / 2, whole / 2) for whole in (there, back)]
    return {"latency_us": latency * 1e6, "gb_per_second": speeds}


def _wait_on_gpu(work: Any, seconds: float) -> None:
    """Until it is done there. Given a time-out, NCCL's own `wait` looks once in a millisecond, which would be what is
    measured. Raises TimeoutError."""
    import torch

    work.wait()  # lets the stream wait, not the host
    event = torch.cuda.Event()
    event.record()
    end = time.perf_counter() + seconds
    while not event.query():
        if time.perf_counter() > end:
            raise TimeoutError(f"no answer within {seconds:.0f} s")


def _result(store: Any, backend: str, pair: Pair) -> dict[str, Any]:
    """Return the result of a pair: an error of either side, else the first side's figures."""
    answers = [
        parse_json(store.get(key), f"rank {rank}") if store.check([key]) else {"error": f"rank {rank} said nothing"}
        for rank, key in ((rank, _key(backend, pair, rank)) for rank in pair)
    ]
    error = next((one["error"] for one in reversed(answers) if "error" in one), None)
    return {"backend": backend, "ranks": list(pair), **(answers[0] if error is None else {"error": error})}


def _until(done: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    with contextlib.suppress(RuntimeError):  # rank 0 is gone
        while not done() and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
