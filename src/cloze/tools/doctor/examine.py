"""The examination: every rank looks around, rank 0 puts together what all have found.

findings = examine(config, meeting)     # on rank 0; {} elsewhere
"""

from __future__ import annotations

from typing import Any

from cloze.config import DoctorConfig
from cloze.tools.doctor.facts import find_facts, find_hub
from cloze.tools.doctor.folder import check_shared, measure_disk, nearest_folder
from cloze.tools.doctor.links import measure_links, measured_ranks, schedule
from cloze.tools.doctor.meeting import Meeting, compare_clocks
from cloze.tools.doctor.this_process import ThisProcess


def examine(config: DoctorConfig, meeting: Meeting) -> dict[str, Any]:
    """Return all findings, as JSON values, on rank 0. Every rank of the meeting calls it; nothing is left on any disk.

    A rank that stops answering costs one timeout and is excluded from later checks.
    """
    process = meeting.process
    answers = meeting.gather("facts", find_facts(process))
    ranks = [facts for facts in answers.values() if facts is not None]
    way = meeting.decide("way", lambda: _way(config, ranks))
    meeting.ranks = way["ranks"]
    hosts = {int(rank): host for rank, host in way["hosts"].items()}
    leaders = [rank for rank in meeting.ranks if rank == min(r for r in meeting.ranks if hosts[r] == hosts[rank])]
    clocks = compare_clocks(meeting, leaders)
    path = nearest_folder(way["path"])
    shared = check_shared(meeting, path)
    disk = measure_disk(path, config.megabytes) if process.rank in leaders else {}
    disks = meeting.gather("disk", disk)
    meeting.ranks = meeting.decide("left", lambda: [rank for rank in meeting.ranks if rank not in meeting.silent])
    rounds = schedule(measured_ranks(meeting.ranks, hosts))
    links = []
    for backend in way["backends"]:
        links += measure_links(meeting, rounds, backend, config.megabytes, apart=backend == "nccl")
    if process.rank:
        return {}
    return {
        "world_size": process.world_size,
        "launcher": process.launcher,
        "head": process.head,
        "port": process.port,
        "timeout": meeting.timeout,
        "ranks": ranks,
        "missing": [rank for rank in range(process.world_size) if rank not in answers],
        "silent": meeting.silent,
        "folder": str(path),
        "shared_error": shared.error,
        "shared": [{"rank": rank, "host": hosts[rank], **one} for rank, one in shared.ranks.items()],
        "disks": [{"host": hosts[rank], **one} for rank, one in disks.items() if one],
        "clocks": [{"host": hosts[rank], **(one or {})} for rank, one in clocks.items()],
        "links": links,
        "hub": find_hub(),
    }


def alone(config: DoctorConfig) -> dict[str, Any]:
    """Return the findings of one process."""
    path = nearest_folder(config.output_dir)
    facts = find_facts(ThisProcess())
    return {
        "world_size": 1,
        "launcher": "",
        "head": "",
        "port": 0,
        "timeout": config.timeout,
        "ranks": [facts],
        "missing": [],
        "silent": [],
        "folder": str(path),
        "shared_error": "",
        "shared": [],
        "disks": [{"host": facts["host"], **measure_disk(path, config.megabytes)}],
        "clocks": [],
        "links": [],
        "hub": find_hub(),
    }


def _way(config: DoctorConfig, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the plan that rank 0 makes for all ranks: participants, folder and backends."""
    with_nccl = all("nccl" in one["versions"] and len(one["gpus"]) > one["local_rank"] for one in ranks)
    return {
        "ranks": [one["rank"] for one in ranks],
        "hosts": {one["rank"]: one["host"] for one in ranks},
        "path": str(nearest_folder(config.output_dir)),
        "backends": ["gloo", "nccl"] if with_nccl else ["gloo"],
    }
