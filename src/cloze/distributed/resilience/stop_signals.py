"""Requests to stop: SIGTERM, SIGUSR1, Ctrl-C, the launcher's death, the end of a SLURM job's time.

A request may reach only some ranks. The ranks vote at each step, so all stop after the same one. Before the processes
have joined there is no vote and nothing to save, and a request ends the process at once.

    with StopSignals(seconds_before_limit=300) as stop:
        ...                                    # a signal raises Stopped here
        stop.hold()
        with stop.joining(): ...               # the processes find each other
        if sum_over_ranks(stop.vote()): ...

A second Ctrl-C ends the process at once; an unfinished checkpoint still has its temporary name. In a process that only
calls training, such as a notebook's kernel, it raises KeyboardInterrupt instead. Ctrl-Z suspends the process and
restores the terminal meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from cloze.errors import Stopped
from cloze.utils.early_signals import REQUESTS, is_importing, is_sent_again, signal_again
from cloze.utils.environment import processes
from cloze.utils.terminal.console import front
from cloze.utils.terminal.screen import all_handed_back, restore

# Ctrl-C in a terminal reaches a rank twice, once through its launcher; within this time it counts once.
SAME_PRESS_SECONDS = 1.0
# Enough for live processes to join; launchers wait 30 s between SIGTERM and SIGKILL.
JOIN_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


class StopSignals:
    """Listens for requests to stop within a `with` block. `own_process`: the process may be ended and ends with its
    launcher; False if it belongs to a caller of training."""

    def __init__(self, seconds_before_limit: int | None = None, own_process: bool = True):
        self._own_process = own_process
        self._reason: str | None = None
        self._code = Stopped.exit_code
        self._holding = self._joining = False
        self._limit: float | None = None
        self._margin = seconds_before_limit
        self._pressed: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if self._margin is not None and (end := slurm_end_time()) is not None:
            self._limit = end - self._margin
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in REQUESTS:
            self._before[number] = signal.signal(number, self._handle)
        if self._own_process and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, lambda *_: None)  # `_listen` does it
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        if processes.is_launched() and self._own_process:
            end_with_launcher()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)
        if self._reason is not None and not self._holding and isinstance(error, Exception):
            raise self.stopped("before training began") from error  # a library converted it to another error

    def hold(self) -> None:
        """Record later requests for the vote instead of raising. Raises Stopped if there was one already."""
        self._holding = True
        if self._reason is not None:
            raise self.stopped("before the first step")

    @contextlib.contextmanager
    def joining(self) -> Iterator[None]:
        """Record requests while the processes join. If a process is gone, the others would wait for half an hour, so a
        request ends this process after JOIN_SECONDS."""
        self._joining = True
        try:
            yield
        finally:
            self._joining = False

    def vote(self) -> int:
        """Return 1 if this rank was asked to stop, else 0."""
        if self._reason is None and self._limit is not None and time.time() >= self._limit:
            self._reason = f"the job's time ends in {self._margin} s"
        return int(self._reason is not None)

    def stopped(self, what: str) -> Stopped:
        """Return the exception that ends the run; `what` states when it stopped."""
        return Stopped(f"{self._reason or 'another rank was asked to stop'}: stopped {what}", self._code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        if number == signal.SIGINT and not self._own_process and self._is_second_press():
            raise KeyboardInterrupt("interrupted twice; the last checkpoint is whole")
        if not self._holding and is_importing(frame):
            signal_again(number)
        elif not self._holding:
            raise self.stopped("before training began")

    def _listen(self) -> None:
        """Receive signals in a thread, because Python's handlers wait while the main thread is inside a library
        call."""
        while data := os.read(self._read, 64):
            for number in data:
                if number == signal.SIGTSTP:
                    with all_handed_back():
                        stop_as_ever(number)
                    continue
                self._note(number)
                if is_sent_again(number):
                    continue
                if number == signal.SIGINT and self._own_process and self._is_second_press():
                    restore()
                    os.write(2, f"{front()}cloze: interrupted twice; the last checkpoint is whole\n".encode())
                    os._exit(128 + signal.SIGINT)
            if self._joining and self._own_process:
                timer = threading.Timer(JOIN_SECONDS, self._leave_if_joining)
                timer.daemon = True
                timer.start()

    def _leave_if_joining(self) -> None:
        if self._joining:
            os.write(
                2, f"{front()}cloze: {self._reason}: stopped while waiting for other processes to join\n".encode()
            )
            os._exit(self._code)

    def _note(self, number: int) -> None:
        if self._reason is None:
            self._reason = "interrupted" if number == signal.SIGINT else signal.Signals(number).name
            self._code = 128 + number if number == signal.SIGINT else Stopped.exit_code

    def _is_second_press(self) -> bool:
        """Return whether this is a second Ctrl-C; two signals of one press count once."""
        now = time.monotonic()
        if self._pressed is None:
            self._pressed = now
        return now - self._pressed > SAME_PRESS_SECONDS


def end_with_launcher() -> None:
    """Ask the kernel for SIGTERM when the parent process dies, because a killed launcher may leave its ranks running
    (Linux only)."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    except (OSError, AttributeError):
        return


def stop_as_ever(number: int) -> None:
    """Suspend the process as SIGTSTP does by default, unless no shell could continue it.

    It may run in any thread, because the main one may be blocked in a collective. So it uses the C library:
    signal.signal requires the main thread.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    handler = libc.signal(number, None)  # SIG_DFL is 0
    signal.pthread_kill(threading.get_ident(), number)  # this thread takes it, and returns when the process resumes
    libc.signal(number, handler)


def slurm_end_time() -> float | None:
    """Return when this SLURM job's time ends, in seconds since the epoch; None outside of SLURM or without a limit."""
    job = processes.slurm_job()
    if not job:
        return None
    if (end := processes.slurm_job_end()) is not None:
        return end
    try:
        shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, timeout=30).stdout
        found = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", shown)
        return time.mktime(time.strptime(found.group(1), "%Y-%m-%dT%H:%M:%S")) if found else None
    except (OSError, subprocess.SubprocessError):
        return None
