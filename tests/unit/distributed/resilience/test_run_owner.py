"""One owner per run folder: of many starts one trains, and a start that lost the folder writes nothing more."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from ranks import wait_for
from run_starts import Start, elsewhere, refuse_link

from cloze.distributed.resilience.owner_file import LOCK, read_owner, this_process
from cloze.distributed.resilience.run_owner import RunOwner, check_owner, is_ours, own_run_folder
from cloze.errors import CheckpointError, DiskError, OwnerError
from cloze.training.branch import branch_to_resume


@pytest.mark.parametrize("stale", [False, True])
def test_of_20_simultaneous_starts_exactly_one_owns_the_folder(tmp_path: Path, stale: bool):
    run = tmp_path / "run"
    if stale:
        first = Start(run)
        assert first.said() == "owned"
        first.kill()
        assert (run / LOCK).exists()
    wait, go = os.pipe()
    starts = [Start(run, go=wait) for _ in range(20)]
    os.write(go, b"x" * 20)
    said = [start.said() for start in starts]
    winner = said.index("owned")
    assert [line for line in said if line != "owned"] == [
        line for line in said if f"pid {starts[winner].pid} on" in line
    ]
    assert [start.end() for start in starts] == [0 if number == winner else 2 for number in range(20)]
    assert sorted(path.name for path in run.iterdir()) == [f"written-{starts[winner].pid}"]


def test_a_second_start_is_refused_in_one_line_and_the_folder_is_free_afterwards(tmp_path: Path):
    with own_run_folder(tmp_path / "run"):
        with pytest.raises(OwnerError) as refused, own_run_folder(tmp_path / "run"):
            pass
        line = str(refused.value)
        assert all(part in line for part in (str(tmp_path / "run"), str(os.getpid()), socket.gethostname(), "since 2"))
        assert "--output_dir" in line
    assert not (tmp_path / "run").exists()  # nothing was written: the folder goes with its lock
    with own_run_folder(tmp_path / "run"):
        pass


def test_a_requeued_job_takes_over_from_a_half_dead_one_which_then_writes_nothing(tmp_path: Path):
    job = {"SLURM_JOB_ID": "4711"}
    old = Start(tmp_path, job)
    assert old.said() == "owned"
    os.kill(old.pid, signal.SIGSTOP)
    same = Start(tmp_path, job)  # srun twice in one job: not a successor
    assert f"pid {old.pid}" in same.said()
    assert same.end() == 2
    new = Start(tmp_path, job | {"SLURM_RESTART_COUNT": "1"})
    assert new.said() == "owned"
    lock = (tmp_path / LOCK).read_bytes()
    os.kill(old.pid, signal.SIGCONT)
    assert old.end() == 3
    assert f"pid {new.pid}" in old.said()
    assert (tmp_path / LOCK).read_bytes() == lock
    assert new.end() == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"written-{new.pid}"]


def test_an_owner_on_another_host_is_dead_after_the_timeout_without_a_heartbeat(tmp_path: Path, capsys):
    elsewhere(tmp_path, pid=7)
    owner = RunOwner(tmp_path, timeout=0.2)
    owner.acquire()
    assert "pid 7 on far" in capsys.readouterr().out
    assert read_owner(tmp_path / LOCK).owner == owner.me  # type: ignore[union-attr]
    owner.release()
    assert list(tmp_path.iterdir()) == []


def test_an_owner_on_another_host_that_beats_is_alive_whatever_its_clock_says(tmp_path: Path):
    lock = elsewhere(tmp_path)
    os.utime(lock, (1, 1))
    waiting = threading.Event()

    def beat() -> None:
        waiting.wait()
        os.utime(lock, (5, 5))

    threading.Thread(target=beat, daemon=True).start()
    owner = RunOwner(tmp_path, timeout=600.0)
    look = owner._is_over
    owner._is_over = lambda found: (look(found), waiting.set())[0]  # type: ignore[method-assign]
    with pytest.raises(OwnerError, match="on far"):
        owner.acquire()


def test_the_lock_has_a_heartbeat(tmp_path: Path):
    owner = RunOwner(tmp_path, beat=0.01)
    owner.acquire()
    os.utime(tmp_path / LOCK, (1, 1))
    wait_for(lambda: (tmp_path / LOCK).stat().st_mtime > 1)
    owner.release()


def test_heartbeats_of_a_start_that_lost_the_folder_do_not_reach_its_successor(tmp_path: Path):
    owner = RunOwner(tmp_path, beat=0.01)
    owner.acquire()
    new = elsewhere(tmp_path / "new")
    os.utime(new, (1, 1))
    os.replace(new, tmp_path / LOCK)
    wait_for(lambda: owner._lost)
    assert (tmp_path / LOCK).stat().st_mtime == 1
    with pytest.raises(OwnerError, match="on far"):
        owner.check()
    owner.release()
    assert (tmp_path / LOCK).exists()


def test_a_start_that_died_while_it_took_over_is_superseded(tmp_path: Path):
    """It had the claim to the dead owner's lock, and did not come to use it."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = replace(this_process("a" * 16), pid=dead.pid)
    (tmp_path / LOCK).write_text(json.dumps(asdict(gone)))
    (tmp_path / f"{LOCK}.after-{'a' * 16}").write_text(json.dumps(asdict(replace(gone, token="b" * 16))))
    (tmp_path / f"{LOCK}.{'c' * 16}").write_text(json.dumps(asdict(replace(gone, token="c" * 16))))
    owner = RunOwner(tmp_path)
    owner.acquire()
    owner.check()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    owner.release()


def test_a_folder_belongs_to_all_ranks_of_the_launch_that_owns_it_or_to_everybody(tmp_path: Path):
    assert is_ours(tmp_path)
    with own_run_folder(tmp_path / "run"):
        assert is_ours(tmp_path / "run")
    elsewhere(tmp_path / "other", launch="another")
    assert not is_ours(tmp_path / "other")
    elsewhere(tmp_path / "other", launch=this_process("me").launch)
    assert is_ours(tmp_path / "other")


def test_only_rank_0_owns_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    with own_run_folder(tmp_path / "run"):
        assert not (tmp_path / "run").exists()


def test_a_fork_does_not_release_what_its_parent_owns(tmp_path: Path):
    owner = RunOwner(tmp_path)
    owner.acquire()
    pid = os.fork()
    if not pid:
        owner.release()
        os._exit(0)
    os.waitpid(pid, 0)
    owner.check()
    owner.release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_hard_links_has_one_owner_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "link", refuse_link)
    elsewhere(tmp_path)
    owner = RunOwner(tmp_path, timeout=0.1)
    owner.acquire()
    with pytest.raises(OwnerError, match="another start is training"):
        RunOwner(tmp_path).acquire()
    owner.check()
    owner.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_somebody_removed_ends_the_run(tmp_path: Path):
    with own_run_folder(tmp_path):
        check_owner(tmp_path)
        (tmp_path / LOCK).unlink()
        with pytest.raises(OwnerError, match="was removed"):
            check_owner(tmp_path)


def test_of_two_starts_that_found_the_same_dead_owner_the_slower_one_does_not_take_over(tmp_path: Path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = replace(this_process("a" * 16), pid=dead.pid)
    (tmp_path / LOCK).write_text(json.dumps(asdict(gone)))
    slower, quicker = RunOwner(tmp_path), RunOwner(tmp_path)
    slower._write_own_file()  # it has read the lock, and is about to replace it
    quicker.acquire()
    assert not slower._replace(gone.token)
    quicker.check()
    quicker.release()


def test_a_start_whose_folder_was_moved_names_the_new_place_and_not_another_start(tmp_path: Path):
    owner, successor = RunOwner(tmp_path / "run"), RunOwner(tmp_path / "run")
    owner.acquire()
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(OwnerError) as caught:
        owner.check()
    assert f"it was moved to {tmp_path / 'moved'}" in str(caught.value)
    assert "other start" not in str(caught.value)
    successor.acquire()
    with pytest.raises(OwnerError, match="it was moved to"):
        owner.check()
    successor.release()
    owner.release()


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_copy_of_a_live_run_folder_is_free_and_the_original_is_not(tmp_path: Path, monkeypatch, hard_links: bool):
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse_link)
    start = Start(tmp_path / "run")
    assert start.said() == "owned"
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with own_run_folder(tmp_path / "copy"):
        check_owner(tmp_path / "copy")
    with pytest.raises(OwnerError, match="another start is training"):
        RunOwner(tmp_path / "run").acquire()
    assert start.end() == 0


def test_a_run_folder_that_is_a_file_or_a_link_to_nothing_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("unmounted")
    for name, what in (("file", "is no folder"), ("link", "is a link to a folder that does not exist")):
        with pytest.raises(DiskError, match=f"{name}: {what}"):
            RunOwner(tmp_path / name).acquire()
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_run_whose_run_json_is_damaged_does_not_begin_anew_without_a_checkpoint(tmp_path: Path):
    (tmp_path / "run.json").write_text('{"branched_from": "/a/check')
    with pytest.raises(CheckpointError, match=r"run\.json: not JSON"):
        branch_to_resume(tmp_path)
