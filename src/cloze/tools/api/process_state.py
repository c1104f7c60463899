"""Leave a process as it was that does more than one run, such as a notebook's kernel.

    with preserve_process_state():
        train(config, own_process=False)

Training sets what a process has one of: random states, accelerate's state, the environment, warning filters, torch's
switches for determinism. Afterwards they are as before. Signal handlers are restored by
`cloze.distributed.resilience.stop_signals`, and a process group is never made here (see
`cloze.tools.api.local_workers`).
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from cloze.errors import ClozeError, Stopped
from cloze.utils.environment import processes
from cloze.utils.system import Tf32Settings

R = TypeVar("R")
_LOADED_IN = os.getpid()


def is_launched() -> bool:
    """Return whether a launcher has started this process as one of several: then it is training's own."""
    return processes.is_launched()


@contextlib.contextmanager
def preserve_process_state() -> Iterator[None]:
    """Restore the state of the process at the end of the block; what remains are files."""
    if is_launched():
        join_as_rank()
        yield
        return
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [state._shared_state for state in (AcceleratorState, GradientState, PartialState)]
    held = [dict(state) for state in states]
    environment, python_random, numpy_random = dict(os.environ), random.getstate(), np.random.get_state()
    switches = _Switches()
    for state in states:
        state.clear()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            yield
    finally:
        for state, values in zip(states, held, strict=True):
            state.clear()
            state.update(values)
        switches.restore()
        random.setstate(python_random)
        np.random.set_state(numpy_random)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def join_as_rank() -> None:
    """Join as one of the processes that `accelerate.notebook_launcher` forked from a notebook's kernel.

    OpenMP's threads do not survive a fork: an operation that is shared between them never ends (torch 2.13 with
    GNU's OpenMP, where the kernel has computed anything with several threads). With one thread nothing is shared.
    """
    import torch

    if os.getpid() != _LOADED_IN:
        torch.set_num_threads(1)


def strip_traceback(call: Callable[[], R]) -> R:
    """Return `call()`; raise its ClozeError, Stopped or KeyboardInterrupt from here, without the frames inside it:
    those keep the model in memory as long as a notebook holds its last error, and do not help its reader."""
    try:
        return call()
    except (ClozeError, Stopped, KeyboardInterrupt) as error:
        if is_launched():
            raise
        problem = error.with_traceback(None)
        problem.__context__ = problem.__cause__ = None
    raise problem


class _Switches:
    """torch's switches that training may set, as they are now."""

    def __init__(self) -> None:
        import torch

        self._deterministic = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        self._fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        self._cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        self._tf32 = Tf32Settings()

    def restore(self) -> None:
        """Set them again."""
        torch = sys.modules["torch"]
        enabled, warn_only = self._deterministic
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = self._fill
        cudnn = torch.backends.cudnn
        cudnn.deterministic, cudnn.benchmark = self._cudnn
        self._tf32.restore()
