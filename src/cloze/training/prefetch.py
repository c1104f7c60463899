"""Asynchronous copies: batches to the device before their step, small results from it after the step.

    loader = TrainLoader(to_device(build, device), start_step, end_step)   # build: global step -> StepBatches
    for batch in loader:
        arrive(batch)                     # the compute stream waits for the copies, the host does not
        ...
        outcome = HostCopy(flags)         # starts the copy
    outcome.read()                        # a step later, when it has finished

Copies run on a stream of their own from pinned memory, in the loader's thread. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from cloze.data.batches.loader import StepBatches


def to_device(build: Callable[[int], StepBatches], device: torch.device) -> Callable[[int], StepBatches]:
    """Return `build` with its batches on the device; `arrive` must precede their use."""
    if device.type != "cuda":
        return build
    stream = torch.cuda.Stream(device)

    def build_there(global_step: int) -> StepBatches:
        step = build(global_step)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            moved = [
                {name: value.pin_memory().to(device, non_blocking=True) for name, value in micro_batch.items()}
                for micro_batch in step.micro_batches
            ]
            ready = torch.cuda.Event()
            ready.record(stream)
        return replace(step, micro_batches=moved, ready=ready)

    return build_there


def arrive(step: StepBatches) -> None:
    """Make the current stream wait for the copies of a batch, and keep their memory until it has used them."""
    if step.ready is None:
        return
    stream = torch.cuda.current_stream()
    stream.wait_event(step.ready)
    for micro_batch in step.micro_batches:
        for value in micro_batch.values():
            value.record_stream(stream)


def host_values(values: list[int], device: torch.device) -> torch.Tensor:
    """Return values as [n] int64 on the device, without waiting for the device."""
    pinned = torch.tensor(values, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


class HostCopy:
    """A copy of a small tensor to host memory. `read` waits for it, but for nothing that was started after it."""

    def __init__(self, value: torch.Tensor):
        self._event: torch.cuda.Event | None = None
        self._host = value
        if value.device.type == "cuda":
            self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """Return the values."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._host.tolist()]
