"""What the doctor says of planted facts: each trouble is found, named, and comes with what to do."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import pytest

from cloze.tools.doctor import facts
from cloze.tools.doctor.report import judge, table
from cloze.tools.doctor.rows import Row

H100 = {"name": "H100", "memory_gib": 80.0, "used_gib": 0.5}
OPS = {"compiler": True, "ninja": True, "cuda_toolkit": True, "cpu_adam": True, "async_io": True}


def rank_facts(rank: int, **changes: Any) -> dict[str, Any]:
    """A healthy rank of two on its host, which has two GPUs."""
    host = f"node{rank // 2 + 1}"
    healthy = {
        "rank": rank, "local_rank": rank % 2, "host": host, "gpus": [H100, H100], "nvidia": True, "offload": "none",
        "versions": {"python": "3.11.2", "torch": "2.13.0", "cuda": "13.0", "nccl": "2.27.3", "driver": "580.65"},
        "limits": {"nofile": 65536, "memlock": None}, "shm_bytes": 64 << 30, "infiniband": True,
        "cpus": list(range(16 * (rank % 2), 16 * (rank % 2) + 16)), "omp_num_threads": "8",
        "interfaces": {}, "ops": OPS if rank % 2 == 0 else None,
    }  # fmt: skip
    return {**healthy, **changes}


def links(speed: float = 40.0, **changed: dict[str, Any]) -> list[dict[str, Any]]:
    """All six pairs over NCCL; `r0r2={...}` changes the pair of ranks 0 and 2."""
    return [
        {"backend": "nccl", "ranks": [a, b], "latency_us": 9.0, "gb_per_second": [speed, speed]}
        | changed.get(f"r{a}r{b}", {})
        for a, b in combinations(range(4), 2)
    ]


def findings(ranks: dict[int, dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """Two healthy hosts of two ranks each, with changes to single ranks and to the whole."""
    disk = {"path": "/shared", "free_bytes": 4e12, "write_mb_per_second": 900.0, "read_mb_per_second": 1900.0}
    seen = {"reads": "", "written": "", "seconds": 0.01}
    healthy = {
        "world_size": 4, "launcher": "srun", "head": "node1", "port": 29500, "timeout": 60.0, "missing": [],
        "silent": [],
        "ranks": [rank_facts(rank, **(ranks or {}).get(rank, {})) for rank in range(4)],
        "folder": "/shared", "shared_error": "", "links": links(),
        "disks": [{"host": "node1", **disk}, {"host": "node2", **disk}],
        "shared": [{"rank": rank, "host": f"node{rank // 2 + 1}", **seen} for rank in (1, 2, 3)],
        "clocks": [{"host": "node2", "ahead_ms": 2.0, "error_ms": 0.1}],
        "hub": {"state": "ok", "name": "me", "role": "write", "scopes": [], "lacks": None},
    }  # fmt: skip
    return json.loads(json.dumps({**healthy, **changes}))  # as it is after its way to rank 0, or to a file


def troubles(planted: dict[str, Any]) -> list[Row]:
    return [row for row in judge(planted) if row.state != "ok"]


def test_nothing_is_said_against_healthy_machines():
    rows = judge(findings())
    assert [row for row in rows if row.state != "ok"] == []
    assert {row.check for row in rows} >= {
        "ranks",
        "versions",
        "nccl",
        "GPUs",
        "folder",
        "disk",
        "clock",
        "CPUs",
        "Hub",
    }


def both(**changes: Any) -> dict[int, dict[str, Any]]:
    """The same change on both ranks of node2."""
    return {2: changes, 3: changes}


def other_version(name: str, version: str) -> dict[int, dict[str, Any]]:
    return both(versions={**rank_facts(0)["versions"], name: version})


NO_COMPILER = {**OPS, "compiler": False}
NO_LIBAIO = {**OPS, "async_io": False}
UNSEEN = [{"rank": 2, "host": "node2", "reads": "No such file or directory", "written": "x", "seconds": 10.0}]
MUTE = [{"rank": 2, "host": "node2", "reads": "", "written": "No such file or directory", "seconds": 10.0}]
LATE = [{"rank": 2, "host": "node2", "reads": "", "written": "", "seconds": 4.2}]
DISK = {
    "host": "node2",
    "path": "/shared",
    "free_bytes": 4e12,
    "write_mb_per_second": 900.0,
    "read_mb_per_second": 1.0,
}
DISK_ERROR = {"host": "node2", "path": "/shared", "error": "Read-only file system"}
READ_ONLY = {"state": "ok", "name": "me", "role": "read", "scopes": [], "lacks": "the token can only read"}


def clock(ahead_ms: float) -> list[dict[str, Any]]:
    return [{"host": "node2", "ahead_ms": ahead_ms, "error_ms": 0.2}]


@pytest.mark.parametrize(
    ("planted", "state", "found", "todo"),
    [
        (
            findings(other_version("torch", "2.12.0")),
            "bad",
            "torch differs: 2.13.0 on node1; 2.12.0 on node2",
            "pip install torch==2.13.0",
        ),
        (
            findings(other_version("driver", "535.1")),
            "bad",
            "driver differs: 580.65 on node1; 535.1 on node2",
            "bring node2 to the same",
        ),
        (
            findings(both(gpus=[H100])),
            "bad",
            "GPUs differ: 2 x H100 80 GiB on node1; 1 x H100 80 GiB on node2",
            "--gpus-per-node",
        ),
        (
            findings(both(gpus=[])),
            "bad",
            "GPUs node2 has GPUs that torch cannot use",
            "driver new enough for CUDA 13.0",
        ),
        (
            findings({rank: {"gpus": [H100]} for rank in range(4)}),
            "bad",
            "GPUs 2 ranks share 1 GPU on node1, node2",
            "--ntasks-per-node",
        ),
        (
            findings(both(gpus=[H100, {**H100, "used_gib": 31.0}])),
            "warn",
            "GPUs 31 of 80 GiB of GPU 1 of node2 are taken",
            "nvidia-smi",
        ),
        (
            findings(both(gpus=[H100, {**H100, "error": "ECC error"}])),
            "bad",
            "GPUs GPU 1 of node2 fails: ECC error",
            "--exclude",
        ),
        (findings(clocks=clock(-3000.0)), "bad", "clock node2 is 3,000 ms (give or take 0.2) behind node1", "chrony"),
        (findings(clocks=clock(200.0)), "warn", "clock node2 is 200 ms (give or take 0.2) ahead of node1", "chrony"),
        (
            findings(both(limits={"nofile": 256, "memlock": None})),
            "bad",
            "ulimit 256 open files are allowed on node2",
            "ulimit -n 65536",
        ),
        (
            findings(both(limits={"nofile": 65536, "memlock": 8 << 20})),
            "bad",
            "ulimit too little memory may be locked for InfiniBand on node2",
            "ulimit -l unlimited",
        ),
        (findings(both(shm_bytes=64 << 20)), "bad", "shm /dev/shm has 64 MiB on node2", "--shm-size"),
        (findings(both(cpus=[0])), "warn", "CPUs 2 ranks share 1 core on node2", "SRUN_CPUS_PER_TASK"),
        (
            findings({rank: {"omp_num_threads": None} for rank in range(4)}),
            "warn",
            "CPUs OMP_NUM_THREADS is not set",
            "export OMP_NUM_THREADS=16",
        ),
        (
            findings(disks=[{**DISK, "free_bytes": 1.5e9}]),
            "bad",
            "disk 1.5 GB are free in /shared on node2",
            "12 bytes a parameter",
        ),
        (
            findings(disks=[{**DISK, "write_mb_per_second": 12.0}]),
            "warn",
            "disk /shared on node2 writes 12 MB/s",
            "--async_save",
        ),
        (findings(disks=[DISK_ERROR]), "bad", "disk /shared on node2: Read-only file system", "--output_dir"),
        (
            findings(shared=UNSEEN),
            "bad",
            "folder node2 does not see what rank 0 wrote in /shared: No such file",
            "all nodes mount",
        ),
        (
            findings(shared=MUTE),
            "bad",
            "folder node2 writes files that the others do not see in /shared",
            "all nodes mount",
        ),
        (findings(shared=LATE), "warn", "folder files in /shared appear on node2 after 4.2 s", "actimeo"),
        (
            findings(shared_error="Permission denied", shared=[]),
            "bad",
            "folder /shared cannot be written: Permission denied",
            "--output_dir",
        ),
        (
            findings(links=links(r1r3={"gb_per_second": [2.0, 40.0]})),
            "bad",
            "nccl rank 1 (node1) and rank 3 (node2): 2.00 GB/s, where the median between hosts is 40.00",
            "ethtool",
        ),
        (
            findings(links=links(r0r1={"gb_per_second": [2.0, 40.0]})),
            "bad",
            "nccl rank 0 (node1) and rank 1 (node1): 2.00 GB/s one way and 40.00 the other",
            "nvidia-smi topo -m",
        ),
        (
            findings(links=links(r0r2={"error": "timeout"})),
            "bad",
            "nccl rank 0 (node1) and rank 2 (node2) cannot talk to each other: timeout",
            "NCCL_SOCKET_IFNAME",
        ),
        (
            findings(links=links(speed=0.05)),
            "warn",
            "nccl 4 pairs between hosts: 0.05 / 0.05 / 0.05 GB/s",
            "is it the fast network",
        ),
        (
            findings(both(ops=NO_COMPILER, offload="none")),
            "warn",
            "DeepSpeed cpu_adam (offload from a GPU) cannot be built on node2",
            "g++",
        ),
        (
            findings(both(ops={**OPS, "ninja": False}, offload="cpu")),
            "bad",
            "DeepSpeed cpu_adam (offload from a GPU) cannot be built on node2",
            "pip install ninja",
        ),
        (
            findings(both(ops=NO_LIBAIO)),
            "warn",
            "DeepSpeed async_io (offload to NVMe) cannot be built on node2",
            "libaio-dev",
        ),
        (
            findings(both(ops=NO_LIBAIO, offload="nvme")),
            "bad",
            "DeepSpeed async_io (offload to NVMe) cannot be built on node2",
            "libaio-dev",
        ),
        (findings(hub={"state": "absent"}), "warn", "Hub no token", "hf auth login"),
        (findings(hub=READ_ONLY), "warn", "Hub token of me: the token can only read", "hf auth login"),
        (findings(hub={"state": "no answer within 8 s"}), "warn", "Hub no answer", "HF_HUB_OFFLINE=1"),
        (
            findings(missing=[4, 5], world_size=6),
            "bad",
            "ranks only 4 ranks on 2 hosts (node1, node2) came within 60 s; missing: 4, 5",
            "open node1:29500",
        ),
        (findings(silent=[3]), "bad", "ranks said nothing for 60 s: 3 (node2)", "were they killed"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_a_planted_trouble_is_named_with_what_to_do(planted: dict, state: str, found: str, todo: str):
    rows = [row for row in troubles(planted) if f"{row.check} {row.found}".startswith(found)]
    assert [row.state for row in rows] == [state], troubles(planted)
    assert todo in rows[0].todo


def test_every_trouble_says_what_to_do():
    ill = findings(other_version("torch", "2.12.0") | {1: {"shm_bytes": 1}}, missing=[4], disks=[], hub={"state": "x"})
    assert troubles(ill)
    assert [row for row in troubles(ill) if not row.todo] == []


def test_a_slow_pair_among_many_is_the_only_one_named():
    rows = troubles(findings(links=links(r1r3={"gb_per_second": [1.0, 1.0]})))
    assert [row.found.split(":")[0] for row in rows] == ["rank 1 (node1) and rank 3 (node2)"]


def test_many_pairs_with_the_same_trouble_are_summed_up_and_point_at_their_host():
    dead = {f"r{a}r{b}": {"error": "timeout"} for a, b in combinations(range(4), 2)}
    rows = troubles(findings(links=links(**dead)))
    assert len(rows) == 5
    assert rows[-1].found.startswith("2 more pairs cannot talk")


def test_the_table_is_aligned_and_coloured_only_when_asked():
    rows = [Row("clock", "bad", "a " * 60, "do " * 60), Row("versions", "ok", "fine")]
    plain = table(rows, width=80, colour=False)
    assert max(map(len, plain.splitlines())) <= 80
    assert "\033" not in plain
    assert "BAD   clock     a a" in plain
    assert "ok    versions  fine" in plain
    assert "\n                -> do do" in plain
    assert plain.endswith("1 red row: mend that first; 0 warnings")
    assert "\033[31;1mBAD \033[0m" in table(rows, width=80, colour=True)


@pytest.mark.parametrize(("permission", "lacks"), [("repo.write", None), ("repo.content.read", "lacks the scope")])
def test_the_scopes_of_a_hub_token_are_told_and_the_token_is_not(permission: str, lacks: str | None, monkeypatch):
    scoped = [{"entity": {"name": "me"}, "permissions": [permission]}]
    token = {"role": "fineGrained", "fineGrained": {"global": [], "scoped": scoped}}
    who = {"name": "me", "auth": {"accessToken": token}}
    monkeypatch.setenv("HF_TOKEN", "hf_thisisnotatoken")
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: who)
    found = facts.find_hub()
    assert (found["state"], found["name"], found["scopes"]) == ("ok", "me", [permission])
    assert found["lacks"] is None if lacks is None else lacks in found["lacks"]
    assert "thisisnotatoken" not in json.dumps(found)
    (row,) = [row for row in judge(findings(hub=found)) if row.check == "Hub"]
    assert (row.state == "ok") == (lacks is None)
    assert permission in row.found or lacks in row.found
