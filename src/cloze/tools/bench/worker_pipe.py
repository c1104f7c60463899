"""Orders to a training loop in a process of its own, and its answers: see `bench.peers`.

gate = Gate()
serve(peer, gate)       # peer.train(batch, gate) takes steps without end, and calls gate() before each
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

# Untimed steps at the start of every turn. Between turns, free GPU memory is released and the GPU's queue drains. On
# the CPU only the caches are cold, and each step of these models overwrites them anyway.
LEADING_STEPS = 2 if torch.cuda.is_available() else 0


class NewBatch(Exception):
    """The next order is for another number of blocks per step."""


class Gate:
    """Called before every step: waits for an order, admits its steps, and reports their time."""

    def __init__(self) -> None:
        self.batch = self._steps = self._passed = 0
        self._begin = self._cpu_begin = 0.0

    def wait(self) -> None:
        """Take the next order. The process ends where stdin does."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        order = json.loads(line)
        changed = self.batch not in (0, order["batch"])
        self.batch, self._steps, self._passed = order["batch"], order["steps"], 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if changed:
            raise NewBatch

    def __call__(self) -> None:
        """Wait for permission to begin one step."""
        if self._passed == LEADING_STEPS + self._steps:
            seconds, cpu_seconds = _now() - self._begin, _cpu_seconds() - self._cpu_begin
            memory = {"peak_bytes": _peak_bytes(), "graphs": _compiled_graphs()}
            report({"seconds": seconds, "cpu_seconds": cpu_seconds, **memory})
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.wait()
        if self._passed == LEADING_STEPS:
            self._begin, self._cpu_begin = _now(), _cpu_seconds()
        self._passed += 1


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _cpu_seconds() -> float:
    """Return the CPU seconds that all threads of this process and its running workers have used (Linux)."""
    seconds = time.process_time()
    for worker in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user, system
    return seconds


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _compiled_graphs() -> int:
    """Return how many graphs torch.compile has made in this process: more after warm-up are recompilations."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0


def report(values: dict[str, Any]) -> None:
    """Answer an order."""
    sys.__stdout__.write(f"REPORT {json.dumps(values)}\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def serve(peer: Any, gate: Gate) -> None:
    """Take orders until stdin ends."""
    gate.wait()
    while True:
        refused = False
        try:
            peer.train(gate.batch, gate)
        except NewBatch:
            pass
        except RuntimeError as error:  # CUDA reports out of memory with several classes
            if not any(word in str(error) for word in ("out of memory", "ALLOC_FAILED")):
                raise
            refused = True
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if refused:
            report({"out_of_memory": True})
            gate.batch = 0
            gate.wait()
