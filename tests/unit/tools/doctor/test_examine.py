"""How the doctor finds its facts: who meets whom, what is measured, and nothing is left there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from cloze.distributed.secret import secret_port
from cloze.errors import LaunchError
from cloze.tools.doctor import facts, folder
from cloze.tools.doctor.links import ALONE_LIMIT, measured_ranks, schedule
from cloze.tools.doctor.meeting import Meeting, compare_clocks
from cloze.tools.doctor.this_process import ThisProcess, find_this_process, first_host


@pytest.mark.parametrize("number", [2, 3, 16, 17, 18, 33])
def test_every_two_ranks_meet_once_and_nobody_is_in_two_pairs_of_a_round(number: int):
    ranks = list(range(0, 3 * number, 3))
    rounds = schedule(ranks)
    assert sorted(pair for pairs in rounds for pair in pairs) == sorted(combinations(ranks, 2))
    for pairs in rounds:
        assert len({rank for pair in pairs for rank in pair}) == 2 * len(pairs)
    if number > ALONE_LIMIT:
        assert len(rounds) == number - 1 + number % 2
    else:
        assert {len(pairs) for pairs in rounds} == {1}


def test_above_sixteen_ranks_the_first_of_each_host_is_measured():
    hosts = {rank: f"node{rank // 8}" for rank in range(32)}
    assert measured_ranks(list(range(1, 32)), hosts) == [1, 8, 16, 24]
    assert measured_ranks(list(range(16)), hosts) == list(range(16))
    assert measured_ranks(list(range(32)), dict.fromkeys(range(32), "node0")) == list(range(16))


def test_the_launcher_is_read_from_its_variables():
    srun = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "12345"}
    process = find_this_process({**srun, "SLURM_STEP_NODELIST": "gpu-b1"})
    assert (process.rank, process.world_size, process.local_rank, process.head, process.port) == (
        3,
        4,
        1,
        "gpu-b1",
        29845,
    )
    known = {**srun, "SLURM_STEP_NODELIST": "a", "CLOZE_SECRET": "0123456789abcdef"}
    assert find_this_process(known).port == secret_port("0123456789abcdef", "12345") != 29845
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "7"}
    process = find_this_process({**srun, **torchrun, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert (process.rank, process.head, process.port, process.served) == (1, "h", 7, True)
    # A batch script has these too, but nobody started the other tasks.
    assert (
        find_this_process({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "a[1-2]"}).world_size == 1
    )
    with pytest.raises(LaunchError, match="MASTER_PORT is not set"):
        find_this_process({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h"})


@pytest.mark.parametrize(
    ("nodes", "first"), [("node[03-05,9],big1", "node03"), ("big1,node[1-2]", "big1"), ("r[2,7]-gpu", "r2-gpu")]
)
def test_the_head_is_found_without_scontrol(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert first_host(nodes) == first


def test_offload_is_read_from_the_settings_of_the_launcher(tmp_path: Path):
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"offload_param": {"device": "nvme"}}}))
    assert facts.find_offload({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(settings)}) == "nvme"
    assert facts.find_offload({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}) == "cpu"
    assert facts.find_offload({}) == "none"


def test_the_disk_is_measured_without_leaving_anything(tmp_path: Path):
    found = folder.measure_disk(folder.nearest_folder(str(tmp_path / "runs" / "new")), megabytes=2)
    assert found["path"] == str(tmp_path)
    assert found["free_bytes"] > 0
    assert found["write_mb_per_second"] > 0
    assert found["read_mb_per_second"] > 0
    assert list(tmp_path.iterdir()) == []
    assert folder.measure_disk(tmp_path / "nowhere", megabytes=1)["error"] == "No such file or directory"


def test_one_process_looks_at_its_machine_and_leaves_nothing(tmp_path: Path):
    token = "hf_thisisnotatoken"
    environment = {**os.environ, "HF_TOKEN": token, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    words = [
        "doctor",
        "--output_dir",
        str(tmp_path / "runs"),
        "--megabytes",
        "4",
        "--json",
        str(tmp_path / "facts.json"),
    ]
    done = subprocess.run([sys.executable, "-m", "cloze", *words], capture_output=True, text=True, env=environment)
    written = json.loads((tmp_path / "facts.json").read_text())
    assert done.returncode == 2 * any(row["state"] == "bad" for row in written["rows"]), done.stderr
    assert done.stderr == ""
    assert "HF_HUB_OFFLINE is set" in done.stdout
    assert written["findings"]["ranks"][0]["versions"]["torch"] in done.stdout
    assert token not in done.stdout + json.dumps(written)
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_a_head_that_is_not_there_is_one_line_that_names_both_ends():
    where = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    words = [sys.executable, "-m", "cloze", "doctor", "--timeout", "0.2"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **where}, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"cloze: error: rank 1 on {os.uname().nodename}: cannot reach rank 0 on 127.0.0.1:1")
    assert "GLOO_SOCKET_IFNAME" in done.stderr


class Tampered:
    """A store in which one side reads other values than were put there."""

    def __init__(self, store: Any, change: Callable[[str, bytes], bytes]):
        self.store, self.change = store, change

    def get(self, key: str) -> bytes:
        return self.change(key, self.store.get(key))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def as_two_ranks(work: Callable[[Meeting], Any], change: Callable[[str, bytes], bytes]) -> Any:
    """What `work` returns on rank 0, while rank 1, which reads changed values, does it too."""
    store = HashStore()
    meetings = [
        Meeting(ThisProcess(0, 2), store, 5.0, [0, 1]),
        Meeting(ThisProcess(1, 2), Tampered(store, change), 5.0, [0, 1]),
    ]
    other = threading.Thread(target=work, args=(meetings[1],))
    other.start()
    try:
        return work(meetings[0])
    finally:
        other.join()


def test_a_clock_that_is_behind_is_measured_to_the_millisecond():
    def head_is_ahead(key: str, value: bytes) -> bytes:
        return repr(float(value) + 3.0).encode() if key.endswith("/head") else value

    clocks = as_two_ranks(lambda meeting: compare_clocks(meeting, [0, 1]), head_is_ahead)
    assert abs(clocks[1]["ahead_ms"] + 3000) <= clocks[1]["error_ms"] + 0.01
    assert clocks[1]["error_ms"] < 100


def test_a_folder_that_one_rank_does_not_see_is_found_and_left_as_it_was(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(folder, "APPEAR_SECONDS", 0.1)
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()

    def look(meeting: Meeting) -> folder.Shared:
        return folder.check_shared(meeting, tmp_path / "here")

    alike = as_two_ranks(look, lambda key, value: value)
    assert (alike.error, alike.ranks[1]["reads"], alike.ranks[1]["written"]) == ("", "", "")
    elsewhere = as_two_ranks(look, lambda key, value: value.replace(b"/here/", b"/there/"))
    assert elsewhere.ranks[1]["reads"] == "No such file or directory"
    stale = as_two_ranks(look, lambda key, value: value.replace(b'"nonce": "', b'"nonce": "0'))
    assert stale.ranks[1]["reads"] == "it holds something else"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "there"]
