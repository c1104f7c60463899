"""The lock in a run folder: what it says of its owner, and what is done with one that says nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import wait_for
from run_starts import Start, elsewhere

from cloze.distributed.resilience import owner_file
from cloze.distributed.resilience.owner_file import LOCK, Owner, has_ended, read_owner, this_process
from cloze.distributed.resilience.run_owner import RunOwner, own_run_folder
from cloze.errors import OwnerError


def test_a_zombie_is_dead(tmp_path: Path):
    first = Start(tmp_path)
    assert first.said() == "owned"
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: has_ended(read_owner(tmp_path / LOCK).owner, this_process("me")) is True)  # type: ignore[union-attr]
    with own_run_folder(tmp_path):  # its parent has not asked for its exit code yet
        pass
    os.waitpid(first.pid, 0)


def test_another_process_with_the_pid_of_the_owner_is_not_the_owner(tmp_path: Path):
    me = this_process("f" * 16)
    assert has_ended(me, me) is False
    assert me.started is not None
    assert has_ended(replace(me, started=me.started - 1), me) is True
    assert has_ended(replace(me, boot="before the restart"), me) is True
    assert has_ended(replace(me, namespace="pid:[1]"), me) is None
    assert has_ended(replace(me, host="far", machine="x", boot="another"), me) is None
    assert has_ended(replace(me, machine="another of the same name", boot="another"), me) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda lock: lock.write_bytes(b""),
        lambda lock: lock.write_bytes(b"[" * 100_000),
        lambda lock: lock.write_text('{"token": "../../x", "pid": []}'),
        lambda lock: lock.write_text('{"token": "aaaaaaaaaaaaaaaa", "pid": "7", "host": 5}'),
    ],
)
def test_a_lock_that_cannot_be_understood_counts_until_the_timeout(tmp_path: Path, make: Callable[[Path], None]):
    make(tmp_path / LOCK)
    owner = RunOwner(tmp_path, timeout=0.1)
    owner.acquire()
    owner.check()
    owner.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token", ["../../x" * 2, "a" * 7, "a" * 65, 12345678, ["aaaaaaaa"], None])
def test_a_token_that_cloze_does_not_write_is_never_part_of_a_file_name(tmp_path: Path, token: object):
    (tmp_path / LOCK).write_text(json.dumps({"token": token}))
    assert read_owner(tmp_path / LOCK).owner.token.startswith("unknown-")  # type: ignore[union-attr]


def test_values_of_another_type_in_a_lock_are_unknown(tmp_path: Path):
    odd = {"pid": "7", "host": 5, "restart": True, "launch": None, "started": None, "machine": 3, "later": 1}
    (tmp_path / LOCK).write_text(json.dumps({"token": "a" * 16, "boot": "b"} | odd))
    owner = read_owner(tmp_path / LOCK).owner  # type: ignore[union-attr]
    assert owner == Owner(token="a" * 16, boot="b")
    assert type(owner.restart) is int
    assert str(owner) == "an unknown process"


def test_a_lock_that_is_removed_while_it_is_read_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    elsewhere(tmp_path)
    plain = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: (plain(path, *rest), os.unlink(path))[0])
    assert read_owner(tmp_path / LOCK) is None


def test_a_lock_that_cannot_be_read_is_an_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        read_owner(tmp_path / "file" / LOCK)


def test_only_the_same_job_started_again_succeeds_an_owner():
    first = Owner(token="a" * 16, job="7@here", restart=1)
    assert replace(first, restart=2).succeeds(first)
    assert not replace(first, restart=1).succeeds(first)
    assert not replace(first, job="8@here", restart=2).succeeds(first)
    assert not replace(first, job=None, restart=2).succeeds(replace(first, job=None))


def test_without_proc_a_process_that_can_be_signalled_is_alive(monkeypatch: pytest.MonkeyPatch):
    me = this_process("f" * 16)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    monkeypatch.setattr(Path, "exists", lambda _: False)
    monkeypatch.setattr(owner_file, "_stat", lambda _: None)
    assert has_ended(me, me) is False
    assert has_ended(replace(me, pid=dead.pid), me) is True


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda lock: lock.mkdir(), "a folder"),
        (lambda lock: lock.symlink_to(lock.with_name("mine")), "a symbolic link"),
        (lambda lock: os.mkfifo(lock), "not a regular file"),
    ],
)
def test_a_lock_that_is_no_file_is_refused_at_once_and_kept(tmp_path: Path, make: Callable[[Path], None], what: str):
    (tmp_path / "mine").write_text("precious")
    make(tmp_path / LOCK)
    with pytest.raises(OwnerError, match=f"is {what}, not a lock .*; remove .*{LOCK} if nothing is training"):
        RunOwner(tmp_path, timeout=10**6).acquire()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "mine"]
    assert (tmp_path / "mine").read_text() == "precious"
