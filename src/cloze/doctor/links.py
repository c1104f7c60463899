"""How fast two ranks talk to each other: each pair by itself, so that a pair that cannot harms no other.

A pair is a process group of two. Small messages there and back give the latency, one large message each way the
bandwidth. gloo is measured in a thread; NCCL, which can hang where nothing ends it, in a child process.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
import time
from datetime import timedelta
from typing import Any

from cloze.doctor.meeting import LOOK_SECONDS, Meeting, open_store
from cloze.doctor.place import Place

PAIR_SECONDS = 15.0
START_SECONDS = 60.0  # a child process that imports torch and starts CUDA on a cold file system
ROUND_TRIPS = 50
LARGE_MESSAGES = 3
ALONE_LIMIT = 16  # up to so many ranks every pair is measured while all others rest

Pair = tuple[int, int]


def measured_ranks(ranks: list[int], hosts: dict[int, str]) -> list[int]:
    """All ranks where they are few, else the first one of each host."""
    if len(ranks) <= ALONE_LIMIT:
        return ranks
    return [rank for rank in ranks if rank == min(other for other in ranks if hosts[other] == hosts[rank])]


def schedule(ranks: list[int]) -> list[list[Pair]]:
    """Rounds of pairs; every two ranks meet once, and nobody is in two pairs of a round.

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


def measure_links(meeting: Meeting, rounds: list[list[Pair]], backend: str, megabytes: int) -> list[dict[str, Any]]:
    """Measure every pair. Rank 0 returns their `ranks`, `latency_us` and `gb_per_second` [there, back], or `error`.

    Bandwidth in 10^9 bytes a second, latency is half of the quickest-half mean of a round trip.
    """
    place, seconds = meeting.place, min(PAIR_SECONDS, meeting.timeout)
    if any(place.rank in pair for pairs in rounds for pair in pairs):
        arguments = (place, rounds, backend, megabytes, seconds)
        if backend == "gloo":
            worker: Any = threading.Thread(target=_run_rounds, args=(meeting.store, *arguments), daemon=True)
        else:
            worker = multiprocessing.get_context("spawn").Process(target=_run_apart, args=arguments, daemon=True)
        worker.start()
        end = time.monotonic() + START_SECONDS * (backend != "gloo") + (1 + len(rounds)) * 2 * seconds
        while worker.is_alive() and time.monotonic() < end:
            worker.join(LOOK_SECONDS)
        if backend != "gloo" and worker.is_alive():
            worker.kill()
    meeting.tell(f"done-{backend}", True)
    if place.rank:
        return []
    for rank in {rank for pairs in rounds for pair in pairs for rank in pair}:
        meeting.ask(rank, f"done-{backend}", START_SECONDS + (1 + len(rounds)) * 2 * seconds)
    return [_result(meeting.store, backend, pair) for pairs in rounds for pair in pairs]


def _run_apart(place: Place, rounds: list[list[Pair]], backend: str, megabytes: int, seconds: float) -> None:
    """What the child process does: NCCL is to raise at a time-out, and not to end the process."""
    os.environ.update(TORCH_NCCL_BLOCKING_WAIT="1", TORCH_NCCL_ASYNC_ERROR_HANDLING="0")
    _run_rounds(open_store(place, False, START_SECONDS), place, rounds, backend, megabytes, seconds)
    os._exit(0)  # groups are left to the operating system, as in cloze.cli.leave


def _run_rounds(
    store: Any, place: Place, rounds: list[list[Pair]], backend: str, megabytes: int, seconds: float
) -> None:
    """Measure this rank's pairs, round by round; a round is over when each of its pairs has a result."""
    groups = []  # kept: taking a gloo group down can abort the interpreter
    ready = f"ready-{backend}"
    store.add(ready, 1)
    members = {rank for pairs in rounds for pair in pairs for rank in pair}
    _until(lambda: store.add(ready, 0) >= len(members), START_SECONDS)
    for pairs in rounds:
        for a, b in pairs:
            if place.rank in (a, b):
                try:
                    group = open_pair(store, (a, b), place, backend, seconds)
                    groups.append(group)
                    found = _measure_pair(group, place.rank == a, _device(place, backend), megabytes)
                except Exception as error:  # whatever it is, it is what this pair does
                    found = {"error": " ".join(str(error).split())[:200]}
                store.set(f"{backend}/{a}-{b}/{place.rank}", json.dumps(found))
        keys = [f"{backend}/{a}-{b}/{rank}" for a, b in pairs for rank in (a, b)]
        _until(lambda keys=keys: store.check(keys), 2 * seconds)  # type: ignore[misc]


def open_pair(store: Any, pair: Pair, place: Place, backend: str, seconds: float) -> Any:
    """A process group of these two ranks, with interfaces and time-out as in training."""
    import torch
    from torch.distributed import PrefixStore

    own = PrefixStore(f"pair-{backend}/{pair[0]}-{pair[1]}", store)
    number, limit = pair.index(place.rank), timedelta(seconds=seconds)
    if backend == "gloo":
        return torch.distributed.ProcessGroupGloo(own, number, 2, limit)
    torch.cuda.set_device(place.local_rank)
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = limit
    return torch.distributed.ProcessGroupNCCL(own, number, 2, options)


def _device(place: Place, backend: str) -> str:
    return "cpu" if backend == "gloo" else f"cuda:{place.local_rank}"


def _measure_pair(group: Any, first: bool, device: str, megabytes: int) -> dict[str, Any]:
    """Both sides do the same steps in turns; the first one holds the watch."""
    import torch

    other = int(first)  # its number in the pair
    small = torch.zeros(1, dtype=torch.int64, device=device)
    large = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)

    def trip(there: Any, back: Any) -> float:
        """Seconds from the first one's sending until the answer is in."""
        begin = time.perf_counter()
        for tensor, sends in ((there, first), (back, not first)):
            (group.send if sends else group.recv)([tensor], other, 0).wait()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    trip(small, small)  # connections are made at the first message
    trip(large, large)
    around = sorted(trip(small, small) for _ in range(ROUND_TRIPS))[: ROUND_TRIPS // 2]
    latency = sum(around) / len(around) / 2
    there = min(trip(large, small) for _ in range(LARGE_MESSAGES)) - latency
    back = min(trip(small, large) for _ in range(LARGE_MESSAGES)) - latency
    size = (megabytes << 20) / 1e9
    return {"latency_us": latency * 1e6, "gb_per_second": [size / max(there, 1e-9), size / max(back, 1e-9)]}


def _result(store: Any, backend: str, pair: Pair) -> dict[str, Any]:
    """What either of the two told; an error of one is the pair's."""
    found: dict[str, Any] = {"backend": backend, "ranks": list(pair)}
    for rank in reversed(pair):  # the first one's figures count
        key = f"{backend}/{pair[0]}-{pair[1]}/{rank}"
        told = json.loads(store.get(key)) if store.check([key]) else {"error": f"rank {rank} did not come to an end"}
        found = {**found, **told, **({"error": found["error"]} if "error" in found else {})}
    return found


def _until(done: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    with contextlib.suppress(RuntimeError):  # rank 0 is gone
        while not done() and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
