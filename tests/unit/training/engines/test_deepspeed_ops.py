"""Locks of torch's builds: waited for while somebody builds, removed when nobody does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cloze.errors import ConfigError
from cloze.training.engines import deepspeed_ops
from cloze.training.engines.deepspeed_ops import is_held, load_op, wait_for_lock

BUILD = """
import sys
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("building", flush=True)
sys.stdin.read()
baton.release()
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch's lock of async_io would lie, on a disk of this machine."""
    monkeypatch.setattr(deepspeed_ops, "file_system", lambda path: "ext4")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "async_io").mkdir()
    return tmp_path / "async_io" / "lock"


def test_a_lock_that_a_killed_build_has_left_is_removed(lock: Path):
    build = subprocess.Popen([sys.executable, "-c", BUILD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert build.stdout.readline() == b"building\n"
    assert is_held(lock)
    build.kill()
    build.communicate()
    assert lock.exists()
    wait_for_lock(lock)
    assert not lock.exists()


def test_a_build_under_way_is_waited_for(lock: Path, capsys: pytest.CaptureFixture):
    build = subprocess.Popen([sys.executable, "-c", BUILD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert build.stdout.readline() == b"building\n"
    allowed = threading.Event()

    def allow() -> None:
        allowed.set()
        build.stdin.close()

    threading.Timer(1.0, allow).start()
    wait_for_lock(lock)
    assert allowed.is_set()
    assert build.wait() == 0
    assert "waiting for another process that builds async_io" in capsys.readouterr().out


def test_a_lock_that_another_machine_may_hold_is_waited_for_as_long_as_something_is_written(lock: Path, monkeypatch):
    monkeypatch.setattr(deepspeed_ops, "file_system", lambda path: "nfs4")
    lock.touch()
    (lock.parent / "build.ninja").touch()
    for file in (lock, lock.parent / "build.ninja", lock.parent):
        os.utime(file, (time.time() - 60, time.time() - 60))
    with pytest.raises(ConfigError, match="30 s") as caught:
        wait_for_lock(lock, seconds=30)
    assert caught.value.where == str(lock)
    os.utime(lock.parent / "build.ninja")  # it has written: waited for again
    threading.Timer(1.0, lock.unlink).start()
    wait_for_lock(lock, seconds=30)
    assert not lock.exists()


def test_an_op_that_cannot_be_compiled_is_one_line(lock: Path, capsys: pytest.CaptureFixture):
    def load(verbose: bool) -> None:
        raise RuntimeError("Error building extension 'async_io':\nninja: build stopped\n")

    with pytest.raises(ConfigError, match=r"async_io cannot be compiled \(Error building extension") as caught:
        load_op(SimpleNamespace(name="async_io", load=load), "offload to a disk")
    assert "\n" not in str(caught.value)
    assert "compile" in capsys.readouterr().out
