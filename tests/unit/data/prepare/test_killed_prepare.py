"""The same bytes however often the work is killed, and no process is left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prepare_units import config, contents

from cloze.config import PrepareConfig
from cloze.data.prepare.pipeline import prepare


def run_until_killed(settings: PrepareConfig, seconds: float) -> float | None:
    """Prepare in a forked process and kill it after so many seconds; the time it took if it ended before."""
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1), os.dup2(devnull, 2)
        try:
            prepare(settings)
        finally:
            os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return time.monotonic() - begin
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def killed_many_times(corpus: Path, folder: Path, expected: dict[str, bytes], kills: int, packing: str) -> None:
    rng = random.Random(kills)
    takes = run_until_killed(config(corpus, folder / "timed", packing=packing), 60)
    assert takes is not None
    assert contents(folder / "timed") == expected
    done, finished, interrupted = 0, 0, 0
    while done < kills or interrupted <= kills // 4:
        assert done < 5 * kills, "kills did not hit the work"
        output = folder / f"p{finished}"
        while not output.exists() and done < 5 * kills:
            ended = run_until_killed(config(corpus, output, packing=packing), rng.uniform(0, 1.1 * takes))
            takes = (
                min(takes, ended) if ended else takes * 1.01
            )  # a busy machine is slower at some times than at others
            done += 1
            interrupted += (folder / f"p{finished}.parts" / "units").exists()
        prepare(config(corpus, output, packing=packing))
        assert contents(output) == expected
        finished += 1
    assert finished >= kills // 20, "the work was not finished, and begun again, many times"
    assert not list(folder.glob("*.parts"))


@pytest.mark.usefixtures("chosen_before")
@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments(corpus: Path, expected: tuple[str, dict], tmp_path: Path, kills: int):
    packing, bytes_of_one = expected
    killed_many_times(corpus, tmp_path, bytes_of_one, kills, packing)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [each for child in children for each in (child, *descendants(child))]


def test_worker_processes_end_with_a_killed_parent(corpus: Path, expected: tuple[str, dict], tmp_path: Path):
    """The whole command with two workers, killed while they work: nobody is left, and it goes on."""
    packing, bytes_of_one = expected
    settings = vars(config(corpus, tmp_path / "p", packing=packing, num_proc=2))
    flags = [
        word for key, value in settings.items() if value not in (None, False) for word in (f"--{key}", str(value))
    ]
    words = [sys.executable, "-m", "cloze", "prepare", *flags]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    units = tmp_path / "p.parts" / "units"
    deadline = time.monotonic() + 120
    while not list(units.glob("0*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    children = descendants(process.pid)
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    assert not (tmp_path / "p").exists()
    prepare(config(corpus, tmp_path / "p", packing=packing))
    assert contents(tmp_path / "p") == bytes_of_one
