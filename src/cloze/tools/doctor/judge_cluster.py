"""What concerns all machines together: did all come, are they the same, do they share a folder and the time."""

from __future__ import annotations

from cloze.tools.doctor.rows import Findings, Row, State, by_value, count, hosts_of, naming

# A checkpoint of RoBERTa-large (355M parameters) is 4.3 GB: 12 bytes a parameter for weights and two moments.
LEAST_FREE_BYTES, GOOD_FREE_BYTES = 5e9, 50e9
SLOW_DISK_MB_PER_SECOND = 50.0
CLOCK_WARN_MS, CLOCK_BAD_MS = 100.0, 1000.0  # logs and file times of several nodes are compared to the second


def judge_ranks(findings: Findings) -> list[Row]:
    """Judge whether all ranks joined and stayed."""
    hosts, missing, silent = hosts_of(findings), findings["missing"], findings["silent"]
    if findings["world_size"] == 1:
        host = next(iter(hosts))
        return [Row("ranks", "ok", f"one process on {host}; `srun cloze doctor` or torchrun looks at several")]
    came = f"{count(len(findings['ranks']), 'rank')} on {count(len(hosts), 'host')} ({naming(list(hosts))})"
    rows: list[Row] = []
    if missing:
        names = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
        what = f"only {came} came within {findings['timeout']:.0f} s; missing: {names}"
        head = f"{findings['head']}:{findings['port']}"
        todo = (
            f"see what those print; open {head} between the nodes, or choose the network with MASTER_ADDR (with it "
            "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME)"
        )
        rows.append(Row("ranks", "bad", what, todo))
    if silent:
        host_of = {facts["rank"]: facts["host"] for facts in findings["ranks"]}
        names = ", ".join(f"{rank} ({host_of[rank]})" if rank in host_of else str(rank) for rank in silent[:8])
        todo = "see what they print, and `dmesg` there: were they killed? does a file system hang?"
        rows.append(Row("ranks", "bad", f"said nothing for {findings['timeout']:.0f} s: {names}", todo))
    return rows or [Row("ranks", "ok", came)]


def judge_versions(findings: Findings) -> list[Row]:
    """Return one row if all versions agree, else one for each package that differs."""
    rows: list[Row] = []
    same = []
    for name in dict.fromkeys(name for facts in findings["ranks"] for name in facts["versions"]):
        values = by_value(findings, lambda facts, name=name: facts["versions"].get(name, "missing"))  # type: ignore[misc]
        if len(values) > 1:
            usual = next(iter(values))
            others = [host for value, hosts in values.items() if value != usual for host in hosts]
            what = "; ".join(f"{value} on {naming(hosts)}" for value, hosts in values.items())
            fix = f"`pip install {name}=={usual}` on {naming(others)}, or"
            if name in ("python", "cuda", "nccl", "driver", "cloze") or usual == "missing":
                fix = f"bring {naming(others)} to the same;" if name == "driver" else ""
            todo = f"{fix} use one environment in a folder that all nodes share".strip()
            rows.append(Row(name, "bad", f"differs: {what}", todo))
        elif "missing" in values:
            rows.append(Row(name, "bad", "is not installed", f"`pip install {name}`"))
        else:
            same.append(f"{name} {next(iter(values))}")
    where = "" if len(hosts_of(findings)) == 1 else f"the same on {len(hosts_of(findings))} hosts: "
    return [Row("versions", "ok", where + ", ".join(same)), *rows]


def judge_shared(findings: Findings) -> list[Row]:
    """Judge whether all ranks see the same folder."""
    path, seen = findings["folder"], findings["shared"]
    if len(findings["ranks"]) == 1:
        return []
    elsewhere = "give an --output_dir on a file system that all nodes mount in the same place, and may write to"
    if findings["shared_error"]:
        return [Row("folder", "bad", f"{path} cannot be written: {findings['shared_error']}", elsewhere)]
    rows: list[Row] = []
    for problem, what in (
        ("reads", "does not see what rank 0 wrote"),
        ("written", "writes files that the others do not see"),
    ):
        failed = [one for one in seen if one[problem] and (problem == "reads" or not one["reads"])]
        if failed:
            hosts = naming([one["host"] for one in failed])
            rows.append(Row("folder", "bad", f"{hosts} {what} in {path}: {failed[0][problem]}", elsewhere))
    late = [one for one in seen if one["seconds"] > 1 and not one["reads"] and not one["written"]]
    if late:
        slowest = max(late, key=lambda one: one["seconds"])
        what = f"files in {path} appear on {slowest['host']} after {slowest['seconds']:.1f} s only"
        rows.append(Row("folder", "warn", what, "mount it with a shorter attribute cache (NFS: actimeo=1)"))
    return rows or [Row("folder", "ok", f"{path}: each rank reads what the others write")]


def judge_disks(findings: Findings) -> list[Row]:
    """Judge free space and speed of the disk on each host."""
    rows: list[Row] = []
    free = min((one["free_bytes"] for one in findings["disks"] if "free_bytes" in one), default=0)
    for one in findings["disks"]:
        at = f"{one['path']} on {one['host']}"
        if "error" in one:
            rows.append(Row("disk", "bad", f"{at}: {one['error']}", "choose another --output_dir, or mount it there"))
        elif one["free_bytes"] < LEAST_FREE_BYTES:
            todo = "free some space or choose another --output_dir: a checkpoint takes 12 bytes a parameter"
            rows.append(Row("disk", "bad", f"{one['free_bytes'] / 1e9:.1f} GB are free in {at}", todo))
        elif one["write_mb_per_second"] < SLOW_DISK_MB_PER_SECOND:
            what = f"{at} writes {one['write_mb_per_second']:.0f} MB/s, with fsync"
            todo = "use a parallel or local file system for --output_dir; --async_save hides the waiting"
            rows.append(Row("disk", "warn", what, todo))
    if not rows and free < GOOD_FREE_BYTES:
        todo = "a checkpoint takes 12 bytes a parameter (RoBERTa-large 4.3 GB): keep few with --save_total_limit"
        rows.append(Row("disk", "warn", f"{free / 1e9:.0f} GB are free in {findings['folder']}", todo))
    if rows:
        return rows
    writes, reads = (min(one[f"{way}_mb_per_second"] for one in findings["disks"]) for way in ("write", "read"))
    least = " at least" if len(findings["disks"]) > 1 else ""
    what = f"{free / 1e9:,.0f} GB free{least}; writes {writes:,.0f} MB/s with fsync, reads {reads:,.0f} MB/s{least}"
    return [Row("disk", "ok", f"{findings['folder']}: {what}")]


def judge_clocks(findings: Findings) -> list[Row]:
    """Do the hosts' clocks agree with rank 0's."""
    rows: list[Row] = []
    good = []
    for one in findings["clocks"]:
        if "ahead_ms" not in one:
            rows.append(Row("clock", "warn", f"{one['host']} gave no answer", "look at what it prints"))
            continue
        off, error = abs(one["ahead_ms"]), one["error_ms"]
        if off - error <= CLOCK_WARN_MS:
            good.append((off, error))
            continue
        side = "ahead of" if one["ahead_ms"] > 0 else "behind"
        state: State = "bad" if off - error > CLOCK_BAD_MS else "warn"
        what = f"{one['host']} is {off:,.0f} ms (give or take {error:.1f}) {side} {findings['ranks'][0]['host']}"
        rows.append(Row("clock", state, what, "start chrony or systemd-timesyncd there; see `timedatectl`"))
    if good and not rows:
        off, error = max(good)
        rows.append(Row("clock", "ok", f"{off:.1f} ms apart at most (give or take {error:.1f})"))
    return rows
