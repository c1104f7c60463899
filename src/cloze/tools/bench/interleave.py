"""Processes that take turns in the order of `bench.pairs`: each waits while another takes its steps.

with Peers(["cloze", "bare"], settings, gpu=False) as peers:
    batch = best_batch(peers, "cloze", block_size=128)
    turn = peers.run("cloze", batch, steps=1)          # turn.seconds per step, turn.cpu_seconds, turn.peak_bytes
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

# The search for a batch doubles from this many tokens on, and stops if it is less than 3 % faster.
SEARCH_FROM_TOKENS = 8192
SEARCH_STEPS = 3
GAIN = 1.03
LARGEST_BATCH = 4096


@dataclass(frozen=True)
class Turn:
    """Wall seconds and CPU seconds per step, peak memory in bytes, and the number of graphs compiled so far."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    graphs: int


class OutOfMemory(Exception):
    """The batch does not fit."""


class PeerFailed(Exception):
    """A peer's process ended; its last words."""


def peer_environment(gpu: bool) -> dict[str, str]:
    """Return a peer's environment variables. With `gpu` one GPU is visible; otherwise none is, and OpenMP threads
    sleep while they wait unless OMP_WAIT_POLICY is set: on a busy machine, spinning threads can multiply the time of a
    step, and use CPU time without doing work."""
    if not gpu:
        return {"OMP_WAIT_POLICY": "passive", **os.environ, "CUDA_VISIBLE_DEVICES": ""}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    return {**os.environ, "CUDA_VISIBLE_DEVICES": visible.split(",")[0]}


class Peers:
    """The processes of one comparison; they end with the `with` block. `settings`: what `bench.peers` takes."""

    def __init__(self, names: list[str], settings: dict[str, Any], gpu: bool):
        self._names, self._settings, self._env = names, settings, peer_environment(gpu)
        self._running: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Peers:
        for name in self._names:
            words = [sys.executable, "-m", "cloze.tools.bench.peers", name, json.dumps(self._settings)]
            with open(self._log(name), "w") as log:
                self._running[name] = subprocess.Popen(
                    words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=self._env
                )
        return self

    def _log(self, name: str) -> Path:
        return Path(self._settings["folder"]) / f"{name}.log"

    def run(self, name: str, batch: int, steps: int) -> Turn:
        """Let one peer take `steps` steps of `batch` blocks. Raises OutOfMemory; PeerFailed if its process ends."""
        process = self._running[name]
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its process has ended: its output, read below, gives the reason
            process.stdin.write(json.dumps({"batch": batch, "steps": steps}) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            if line.startswith("REPORT "):
                found = json.loads(line.removeprefix("REPORT "))
                if found.get("out_of_memory"):
                    raise OutOfMemory(f"{batch} blocks")
                return Turn(
                    found["seconds"] / steps, found["cpu_seconds"] / steps, found["peak_bytes"], found["graphs"]
                )
        raise PeerFailed(self._log(name).read_text().strip()[-2000:])

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Search:
    """The fastest batch, in blocks, its seconds per step, and tokens per second of all that were tried (None: did not
    fit)."""

    batch: int
    seconds: float
    tried: dict[int, float | None]


def best_batch(peers: Any, name: str, block_size: int, first_tokens: int = SEARCH_FROM_TOKENS) -> Search:
    """Double a peer's batch until it does not fit or is no faster. Raises OutOfMemory if one block does not fit."""
    batch = max(1, first_tokens // block_size)
    tried: dict[int, float | None] = {}
    best: tuple[int, float] | None = None
    while batch <= LARGEST_BATCH and batch not in tried:
        try:
            seconds = peers.run(name, batch, SEARCH_STEPS).seconds
        except OutOfMemory:
            tried[batch] = None
            if batch == 1:
                raise
            batch //= 2  # if the first one does not fit: halve instead of doubling
            continue
        tried[batch] = rate = batch * block_size / seconds
        gained = best is None or rate > GAIN * (best[0] * block_size / best[1])
        if best is None or rate > best[0] * block_size / best[1]:
            best = batch, seconds
        if not gained:
            break
        batch *= 2
    assert best is not None
    return Search(*best, tried)
