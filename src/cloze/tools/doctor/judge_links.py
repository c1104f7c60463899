"""The connections between ranks: those that fail, those that are slower than their like, and how fast the rest is."""

from __future__ import annotations

from statistics import median
from typing import Any

from cloze.tools.doctor.rows import Findings, Row, count, hosts_of

SLOW_SHARE = 4.0  # a pair this many times slower than the median of its kind, or than its other direction, is faulty
LIKE_PAIRS = 3  # so many make a median
SLOW_NETWORK_GB_PER_SECOND = 0.125  # 1 Gbit/s
SHOWN = 4  # of the pairs that have the same trouble

INTERFACES = "choose the network with {}_SOCKET_IFNAME (`ip addr` lists them)"


def judge_links(findings: Findings) -> list[Row]:
    """Return rows for each backend, separately for pairs within hosts and across hosts."""
    if findings["world_size"] == 1:
        gpus = len(findings["ranks"][0]["gpus"])
        if gpus > 1:
            how = f"torchrun --nproc-per-node={gpus} -m cloze doctor"
            return [Row("links", "warn", f"{gpus} GPUs, but one process: NCCL is not tried", f"`{how}` measures it")]
        return []
    rows: list[Row] = []
    host_of = {facts["rank"]: facts["host"] for facts in findings["ranks"]}
    for backend in dict.fromkeys(one["backend"] for one in findings["links"]):
        links = [one for one in findings["links"] if one["backend"] == backend]
        rows += _failed([one for one in links if "error" in one], backend, host_of)
        works = [one for one in links if "error" not in one]
        inside = [one for one in works if host_of[one["ranks"][0]] == host_of[one["ranks"][1]]]
        across = [one for one in works if one not in inside]
        rows += _speed(inside, backend, "inside a host", host_of)
        rows += _speed(across, backend, "between hosts", host_of)
    return rows + _unmeasured(findings)


def say_pair(link: dict[str, Any], host_of: dict[int, str]) -> str:
    """Return the pair in words: `rank 0 (node1) and rank 3 (node2)`"""
    return " and ".join(f"rank {rank} ({host_of[rank]})" for rank in link["ranks"])


def _failed(links: list[dict[str, Any]], backend: str, host_of: dict[int, str]) -> list[Row]:
    rows = []
    todo = INTERFACES.format(backend.upper()) + "; let the nodes' firewall pass all ports between them"
    if backend == "nccl":
        todo += "; NCCL_DEBUG=INFO says more, NCCL_IB_DISABLE=1 shows whether InfiniBand is the cause"
    for link in links[:SHOWN]:
        what = f"{say_pair(link, host_of)} cannot talk to each other: {link['error']}"
        rows.append(Row(backend, "bad", what, todo))
    if len(links) > SHOWN:
        sick: dict[str, int] = {}
        for link in links:
            for rank in link["ranks"]:
                sick[host_of[rank]] = sick.get(host_of[rank], 0) + 1
        worst = max(sick, key=lambda host: sick[host])
        what = f"{len(links) - SHOWN} more pairs cannot talk to each other; most often {worst} is one of them"
        rows.append(Row(backend, "bad", what, f"begin with {worst}"))
    return rows


def _speed(links: list[dict[str, Any]], backend: str, where: str, host_of: dict[int, str]) -> list[Row]:
    """Return one row for all pairs of one kind, and one for each pair that is slower than the others."""
    if not links:
        return []
    usual = median(min(one["gb_per_second"]) for one in links)
    rows: list[Row] = []
    slow = []
    for one in sorted(links, key=lambda one: min(one["gb_per_second"])):
        low, high = min(one["gb_per_second"]), max(one["gb_per_second"])
        if len(links) >= LIKE_PAIRS and low * SLOW_SHARE < usual:
            slow.append((one, f"{low:.2f} GB/s, where the median {where} is {usual:.2f}"))
        elif low * SLOW_SHARE < high:
            slow.append((one, f"{low:.2f} GB/s one way and {high:.2f} the other"))
    todo = "look at cable, port and `ethtool` of the host that the slow pairs share; leave it out with --exclude"
    if where == "inside a host":
        todo = "see `nvidia-smi topo -m`, and whether something else is running there"
    for one, what in slow[:SHOWN]:
        rows.append(Row(backend, "bad", f"{say_pair(one, host_of)}: {what}", todo))
    if len(slow) > SHOWN:
        rows.append(Row(backend, "bad", f"{len(slow) - SHOWN} more pairs are as slow", todo))
    speeds = [min(one["gb_per_second"]) for one in links]
    delays = [one["latency_us"] for one in links]
    what = f"{count(len(links), 'pair')} {where}: {_spread(speeds, '.2f')} GB/s, latency {_spread(delays, '.0f')} us"
    if len(links) > 1:
        what += " (least / median / most)"
    if where == "between hosts" and usual < SLOW_NETWORK_GB_PER_SECOND:
        todo = f"is it the fast network? {INTERFACES.format(backend.upper())}; more gradient_accumulation_steps help"
        return [Row(backend, "warn", what, todo), *rows]
    return [Row(backend, "ok", what), *rows]


def _spread(values: list[float], form: str) -> str:
    """Return one value, or smallest / median / largest."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return " / ".join(f"{one:{form}}" for one in (min(values), median(values), max(values)))


def _unmeasured(findings: Findings) -> list[Row]:
    """Return rows for GPUs that were not measured over NCCL."""
    has_gpus = any(facts["gpus"] for facts in findings["ranks"])
    if not has_gpus or any(one["backend"] == "nccl" for one in findings["links"]):
        return []
    what = "not tried: not every rank has a GPU of its own with NCCL"
    return [Row("nccl", "bad" if len(hosts_of(findings)) > 1 else "warn", what, "see GPUs below")]
