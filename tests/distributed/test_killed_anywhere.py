"""Killed at any moment, again and again, and started again: the same weights as without, nothing to do by hand."""

from __future__ import annotations

import filecmp
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from ranks import at_call, cloze_ranks, entering, sent, start_ranks, succeed, warm_up

STEPS = 10
FLAGS = [
    *TINY_MODEL,
    "--max_steps",
    str(STEPS),
    "--save_steps",
    "2",
    "--logging_steps",
    "1",
    "--save_total_limit",
    "2",
]
FLAGS += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--weight_decay", "0.1"]
# Functions of saving, in each of which a rank is killed, and how many ranks call it.
INSIDE_A_SAVE = [
    ("cloze.training.checkpointing.saver", "write_tensors", 2),
    ("cloze.training.checkpointing.saver", "write_manifest", 1),
    ("cloze.training.checkpointing.saver", "replace_checkpoint", 1),
    ("cloze.checkpoint.format", "publish", 1),
    ("cloze.utils.atomic_files", "sync", 1),
    ("os", "rename", 1),
    ("shutil", "rmtree", 1),
    ("cloze.training.checkpointing.saver", "rotate", 1),
]


def flags(prepared: Path, output: Path, *more: str) -> list[str]:
    where = ["--dataset_name", str(prepared), "--output_dir", str(output), "--resume_from_checkpoint", "auto"]
    return ["train", *FLAGS, *where, *more]


def run_until_killed(
    argv: list[str], engine: str, log: Path, rng: random.Random, takes: float, before: Callable[[], None] | None
) -> list[int]:
    """Two ranks, of which one or both are killed after a while (or by `before`, from inside); their exit codes.

    As launchers do, a rank that is left alone gets SIGTERM; then it has to end by itself.
    """
    pids, _ = start_ranks(entering(argv, engine, before), 2, log)
    codes: dict[int, int] = {}
    now = time.monotonic()
    kill_at = now + (rng.uniform(0.2, 1.1) * takes if before is None else 120)
    victims = pids if rng.random() < 0.5 else [rng.choice(pids)]
    tell_at = give_up_at = now + 1000
    while len(codes) < 2:
        now = time.monotonic()
        for pid in [pid for pid in pids if pid not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                tell_at, give_up_at = now + 3, now + 30
        if now > kill_at:
            kill_at = now + 1000
            send(victims, signal.SIGKILL, codes)
        if now > tell_at:
            tell_at = now + 1000
            send(pids, signal.SIGTERM, codes)
        if now > give_up_at:
            send(pids, signal.SIGKILL, codes)
            pytest.fail(f"a rank did not end after the other had: {codes}")
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def send(pids: list[int], number: int, ended: dict[int, int]) -> None:
    for pid in pids:
        if pid not in ended:
            os.kill(pid, number)


def kill_many_times(prepared: Path, folder: Path, engine: str, kills: int, *more: str) -> None:
    rng = random.Random(kills)
    warm_up()
    begin = time.monotonic()
    succeed(cloze_ranks(flags(prepared, folder / "whole", *more), 2, engine, folder / "log"))
    takes = time.monotonic() - begin
    done, number = 0, 0
    while done < kills:
        run = folder / f"run-{number}"
        argv = flags(prepared, run, *more)
        finished = False
        while not finished:
            before = None
            if done % 2:
                module, name, callers = rng.choice(INSIDE_A_SAVE)
                act, rank = sent(signal.SIGKILL), rng.randrange(callers)
                before = at_call(module, name, rng.randint(1, 4), act, rank)
            codes = run_until_killed(argv, engine, folder / "log", rng, takes, before)
            assert set(codes) <= {0, 75, -signal.SIGKILL}, (folder / "log" / "rank-0.log").read_text()
            finished = codes == [0, 0]
            done += -signal.SIGKILL in codes
            assert len([path for path in run.glob("checkpoint-*") if path.suffix]) <= 1
        number += 1
        names = sorted(path.name for path in (folder / "whole" / f"checkpoint-{STEPS}").glob("*.safetensors"))
        assert len(names) == 4
        for name in names:
            one, other = (each / f"checkpoint-{STEPS}" / name for each in (folder / "whole", run))
            assert filecmp.cmp(one, other, shallow=False), name
        assert not [path.name for path in run.glob("checkpoint-*") if path.suffix]


IN_BACKGROUND = pytest.param("ddp", ["--async_save"], id="ddp-async", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("engine", "more"), [pytest.param("zero2", [], id="zero2", marks=pytest.mark.slow), IN_BACKGROUND]
)
def test_killed_ten_times(prepared: Path, tmp_path: Path, engine: str, more: list[str]):
    kill_many_times(prepared, tmp_path, engine, 10, *more)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--async_save"]], ids=["", "async"])
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_killed_many_times(prepared: Path, tmp_path: Path, engine: str, more: list[str]):
    kill_many_times(prepared, tmp_path, engine, 30, *more)
