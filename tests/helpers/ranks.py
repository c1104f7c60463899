"""Run a function, or a cloze command, on several ranks: real processes, real gloo, real DeepSpeed, in about a second.

torch, transformers, accelerate and DeepSpeed are imported once, in this process; each rank is a fork of it. So this
process itself must never join a process group or start threads that a fork would lose.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")


@dataclass
class Outcome:
    """How one rank ended and what it printed."""

    code: int | str
    output: str


def warm_up() -> None:
    """Import once what every rank needs."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    torch.set_num_threads(1)
    for name in (
        "deepspeed",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "accelerate",
        "transformers.models.roberta.modeling_roberta",
        "cloze.cli.commands.train",
        "cloze.cli.commands.evaluate",
    ):
        importlib.import_module(name)


def run_ranks(function: Callable[..., Any], world_size: int, log_dir: Path, timeout: float = 240, **kwargs: Any):
    """Call `function(**kwargs)` on `world_size` forked ranks; return an `Outcome` for each."""
    pids, logs = start_ranks(function, world_size, log_dir, **kwargs)
    codes = _wait(pids, timeout)
    return [Outcome(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def in_fresh_process(function: Callable[..., Any], *args: Any) -> None:
    """Call a module's function in a process without a history, which its ranks are forks of: memory that other tests
    have freed here would be touched again there, and counted as theirs."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


@functools.cache
def compile_async_io() -> None:
    """Compile DeepSpeed's reader and writer of disks, once on this machine: it takes minutes, which no time limit of a
    test of training is meant for. Skip the test if libaio is missing."""
    if not Path("/usr/include/libaio.h").exists():
        pytest.skip("needs libaio-dev")
    in_fresh_process(_load_async_io)


def _load_async_io() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    from cloze.training.engines.deepspeed_ops import load_op

    load_op(AsyncIOBuilder(), "tests")


def wait_for(
    condition: Callable[[], bool], seconds: float = 90.0, pids: Sequence[int] = (), logs: Sequence[Path] = ()
) -> None:
    """Wait until `condition()` is true. Fail after so many seconds, or if one of the ranks that it depends on has
    ended, and show what the ranks printed."""
    deadline = time.monotonic() + seconds
    while not condition():
        printed = "\n".join(f"{log}:\n{log.read_text()}" for log in logs if log.exists())
        ended = [pid for pid in pids if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)]
        assert not ended or condition(), f"ranks ended, and the condition is still false:\n{printed}"
        assert time.monotonic() < deadline, f"still false after {seconds} s:\n{printed}"
        time.sleep(0.05)


def free_port() -> int:
    """Return a free port below Linux's ephemeral range. A port in that range may be taken by any outgoing connection
    before a rank listens on it."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def start_ranks(function: Callable[..., Any], world_size: int, log_dir: Path, **kwargs: Any):
    """Fork the ranks; return their process numbers and the files they print into."""
    warm_up()
    log_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    logs = [log_dir / f"rank-{rank}.log" for rank in range(world_size)]
    sys.stdout.flush()
    sys.stderr.flush()
    return [_fork_rank(rank, world_size, port, logs[rank], function, kwargs) for rank in range(world_size)], logs


def _fork_rank(rank: int, world_size: int, port: int, log: Path, function: Callable[..., Any], kwargs: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        function(**kwargs)
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _wait(pids: list[int], timeout: float) -> list[int | str]:
    codes: list[int | str | None] = [None] * len(pids)
    end = time.monotonic() + timeout
    while None in codes and time.monotonic() < end:
        for i, pid in enumerate(pids):
            if codes[i] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[i] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for i, pid in enumerate(pids):
        if codes[i] is None:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            codes[i] = "timeout"
    return [code for code in codes if code is not None]


def cloze_ranks(
    argv: list[str],
    world_size: int,
    engine: str,
    log_dir: Path,
    before: Callable[[], None] | None = None,
    timeout: float = 240,
) -> list[Outcome]:
    """Run `cloze ARGV` on forked ranks with one of ENGINES, each rank coming in through the command line.

    `before` is called in each rank first.
    """
    return run_ranks(entering(argv, engine, before), world_size, log_dir, timeout)


def entering(argv: list[str], engine: str, before: Callable[[], None] | None = None) -> Callable[[], None]:
    """What a rank does to run `cloze ARGV` with one of ENGINES."""

    def enter() -> None:
        from cloze.cli import main

        if before is not None:
            before()

        if engine.startswith("zero"):
            os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": engine[4:]}
        if engine == "fsdp2":
            os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        if engine == "single":
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                os.environ.pop(name)
        main(argv)

    return enter


def succeed(outcomes: list[Outcome]) -> None:
    """Fail, showing the output, unless every rank ended with exit code 0."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.code == 0, f"rank {rank} ended with {outcome.code}:\n{outcome.output}"


def at_call(module: str, name: str, number: int, act: Callable[[], None], rank: int = 1) -> Callable[[], None]:
    """To be called in a rank: `act` happens inside the `number`-th call of a function, on one rank."""

    def install() -> None:
        where = importlib.import_module(module)
        plain, calls = getattr(where, name), []

        def disturbed(*args, **kwargs):
            calls.append(1)
            if len(calls) == number and os.environ.get("RANK") == str(rank):
                act()
            return plain(*args, **kwargs)

        setattr(where, name, disturbed)

    return install


def sent(*numbers: int) -> Callable[[], None]:
    def act() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return act
