"""What concerns each machine by itself: GPUs, cores, limits, what DeepSpeed can build; and the Hub token."""

from __future__ import annotations

from typing import Any

from cloze.tools.doctor.rows import Findings, Row, State, count, hosts_of, naming

LEAST_FILES, GOOD_FILES = 1024, 4096  # open at once: mapped shards, sockets to every rank, data loading
LEAST_SHM_BYTES = 1 << 30  # containers get 64 MB; NCCL's documentation asks for 1 GB (--shm-size=1g)
LEAST_LOCKED_BYTES = 1 << 30  # InfiniBand pins its buffers; the default limit is 8 MiB or less
CROWDED_SHARE = 0.5  # cores per rank: two ranks on one core are slow, more are unusable
USED_GPU_GIB, CONTEXT_GIB = 2.0, 0.5  # memory that may be in use: a display, and the CUDA context of each rank


def judge_gpus(findings: Findings) -> list[Row]:
    """Judge whether there are GPUs, of one kind, enough for the ranks, and free."""
    hosts = hosts_of(findings)
    rows = [*_gpus_unseen(hosts), *_gpus_broken(hosts)]
    kinds: dict[str, list[str]] = {}
    for host, ranks in hosts.items():
        names = [f"{gpu['name']} {gpu['memory_gib']:.0f} GiB" for gpu in ranks[0]["gpus"]]
        shown = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"
        kinds.setdefault(shown, []).append(host)
    if len(kinds) > 1:
        what = "; ".join(f"{shown} on {naming(names)}" for shown, names in kinds.items())
        todo = (
            "ask for the same on every node (--gpus-per-node, --constraint), and look at `nvidia-smi` on the odd one"
        )
        return [*rows, Row("GPUs", "bad", f"differ: {what}", todo)]
    shown = next(iter(kinds))
    each = " on each host" if len(hosts) > 1 else ""
    crowded = [host for host, ranks in hosts.items() if ranks[0]["gpus"] and len(ranks) > len(ranks[0]["gpus"])]
    if crowded:
        ranks, gpus = hosts[crowded[0]], hosts[crowded[0]][0]["gpus"]
        what = f"{count(len(ranks), 'rank')} share {count(len(gpus), 'GPU')} on {naming(crowded)}"
        return [
            *rows,
            Row("GPUs", "bad", what, "start one process for each GPU (--ntasks-per-node, --nproc-per-node)"),
        ]
    if shown == "none" and not rows:
        return [Row("GPUs", "ok", f"none{each}: training uses the CPU")]
    return rows or [Row("GPUs", "ok", f"{shown}{each}")]


def _gpus_unseen(hosts: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Return rows for machines with GPUs that torch cannot use."""
    blind = [host for host, ranks in hosts.items() if ranks[0]["nvidia"] and not ranks[0]["gpus"]]
    if not blind:
        return []
    cuda = hosts[blind[0]][0]["versions"].get("cuda")
    todo = "install torch for CUDA: see pytorch.org/get-started"
    if cuda:
        todo = f"is the driver new enough for CUDA {cuda}? is CUDA_VISIBLE_DEVICES empty, or --gpus-per-node missing?"
    return [Row("GPUs", "bad", f"{naming(blind)} has GPUs that torch cannot use", todo)]


def _gpus_broken(hosts: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Judge GPUs that fail, or that another process is using."""
    rows: list[Row] = []
    for host, ranks in hosts.items():
        for number, gpu in enumerate(ranks[0]["gpus"]):
            if gpu.get("error"):
                todo = "look at `nvidia-smi` and `dmesg` there; leave the node out (--exclude) until it is mended"
                rows.append(Row("GPUs", "bad", f"GPU {number} of {host} fails: {gpu['error']}", todo))
            elif gpu["used_gib"] > USED_GPU_GIB + CONTEXT_GIB * len(ranks):
                what = f"{gpu['used_gib']:.0f} of {gpu['memory_gib']:.0f} GiB of GPU {number} of {host} are taken"
                rows.append(Row("GPUs", "warn", what, "run `nvidia-smi` there, and end left-over processes"))
    return rows


def judge_cpus(findings: Findings) -> list[Row]:
    """Judge whether every rank has its own core, and its number of threads."""
    found = []
    for host, ranks in hosts_of(findings).items():
        for facts in ranks:
            sharing = sum(set(other["cpus"]) == set(facts["cpus"]) for other in ranks)
            found.append((len(facts["cpus"]) / sharing, sharing, len(facts["cpus"]), host))
    each, sharing, cores, host = min(found)
    slurm = "ask for more (--cpus-per-task, and `export SRUN_CPUS_PER_TASK`: srun does not take it from the job)"
    if each < 1:
        what = f"{count(sharing, 'rank')} share {count(cores, 'core')} on {host}"
        return [Row("CPUs", "bad" if each < CROWDED_SHARE else "warn", what, f"start fewer ranks, or {slurm}")]
    if each < 2 and findings["ranks"][0]["gpus"]:
        return [Row("CPUs", "warn", f"one core for each rank on {host}: the GPU waits for it", slurm)]
    threads = {facts["omp_num_threads"] for facts in findings["ranks"]}
    shared = any(len(ranks) > 1 for ranks in hosts_of(findings).values())
    too_many = shared and any(int(one) > each for one in threads if one and one.isdigit())
    if shared and (None in threads or too_many):
        said = "is not set" if None in threads else f"is {max(int(one) for one in threads if one and one.isdigit())}"
        what = f"OMP_NUM_THREADS {said}: ranks on one host compete for cores ({count(int(each), 'core')} for each)"
        return [Row("CPUs", "warn", what, f"export OMP_NUM_THREADS={max(1, int(each))}")]
    return [Row("CPUs", "ok", f"{count(int(each), 'core')} for each rank")]


def judge_limits(findings: Findings) -> list[Row]:
    """Judge the limits of `ulimit` and shared memory."""
    rows: list[Row] = []
    files = [(facts["limits"]["nofile"], facts["host"]) for facts in findings["ranks"]]
    low = [(limit, host) for limit, host in files if limit is not None and limit < GOOD_FILES]
    if low:
        limit = min(low)[0]
        state: State = "bad" if limit < LEAST_FILES else "warn"
        what = f"{limit} open files are allowed on {naming([host for _, host in low])}"
        rows.append(Row("ulimit", state, what, "`ulimit -n 65536`, or nofile in /etc/security/limits.conf"))
    several = len(hosts_of(findings)) > 1
    locked = [
        facts["host"]
        for facts in findings["ranks"]
        if facts["infiniband"]
        and facts["limits"]["memlock"] is not None
        and facts["limits"]["memlock"] < LEAST_LOCKED_BYTES
    ]
    if locked:
        todo = (
            "`ulimit -l unlimited`; for SLURM: LimitMEMLOCK=infinity for slurmd, PropagateResourceLimitsExcept=MEMLOCK"
        )
        what = f"too little memory may be locked for InfiniBand on {naming(locked)}"
        rows.append(Row("ulimit", "bad" if several else "warn", what, todo))
    rows += _shared_memory(findings)
    if rows:
        return rows
    allowed = min((limit for limit, _ in files if limit is not None), default=0)
    return [Row("ulimit", "ok", f"{allowed or 'any number of'} open files; /dev/shm is large enough")]


def _shared_memory(findings: Findings) -> list[Row]:
    """Judge the size of /dev/shm, through which ranks on one host exchange data (NCCL; data loading)."""
    small = {
        facts["host"]: (facts["shm_bytes"], len(ranks) > 1 or len(facts["gpus"]) > 1)
        for ranks in hosts_of(findings).values()
        for facts in ranks[:1]
        if facts["shm_bytes"] is not None and facts["shm_bytes"] < LEAST_SHM_BYTES
    }
    if not small:
        return []
    what = f"/dev/shm has {min(size for size, _ in small.values()) / 2**20:.0f} MiB on {naming(list(small))}"
    needed = any(needed for _, needed in small.values())
    todo = "start the container with --shm-size=1g or more (or --ipc=host); else `mount -o remount,size=8G /dev/shm`"
    return [Row("shm", "bad" if needed else "warn", what, todo)]


def judge_ops(findings: Findings) -> list[Row]:
    """Judge DeepSpeed's kernels for offload, which are needed only if the launcher's settings ask for offload."""
    found: dict[tuple[str, State, str], list[str]] = {}
    for host, ranks in hosts_of(findings).items():
        ops, offload, gpu = ranks[0]["ops"], ranks[0]["offload"], bool(ranks[0]["gpus"])
        if ops is None:
            continue
        tools = {"compiler": "a C++ compiler (`apt-get install g++`)", "ninja": "ninja (`pip install ninja`)"}
        if gpu:
            tools["cuda_toolkit"] = f"the CUDA toolkit {ranks[0]['versions'].get('cuda', '')} with nvcc, and CUDA_HOME"
        lacks = [tool for name, tool in tools.items() if not ops.get(name)]
        if lacks or not ops.get("cpu_adam"):
            # Without a compiler Cloze takes torch's AdamW; without the rest of it DeepSpeed fails while building.
            needed = gpu and offload != "none" and ops["compiler"]
            install = (
                "install " + " and ".join(lacks) if lacks else f"see `ds_report` ({ops.get('error', 'cpu_adam')})"
            )
            key: tuple[str, State, str] = (
                "cpu_adam (offload from a GPU)",
                "bad" if needed else "warn",
                f"for offload {install}",
            )
            found.setdefault(key, []).append(host)
        if lacks or not ops.get("async_io"):
            install = " and ".join(
                ["libaio's headers (`apt-get install libaio-dev`)"] * (not ops.get("async_io")) + lacks
            )
            key = "async_io (offload to NVMe)", "bad" if offload == "nvme" else "warn", f"for NVMe install {install}"
            found.setdefault(key, []).append(host)
    rows = [
        Row("DeepSpeed", state, f"{op} cannot be built on {naming(hosts)}", todo)
        for (op, state, todo), hosts in found.items()
    ]
    return rows or [Row("DeepSpeed", "ok", "cpu_adam and async_io (offload) can be built")]


def judge_hub(findings: Findings) -> list[Row]:
    """Judge access to the Hub. It is optional: no row is red."""
    hub = findings["hub"]
    login = "to push: `hf auth login` with a token that may write; else leave it"
    if hub["state"] == "absent":
        return [Row("Hub", "warn", "no token", login)]
    if hub["state"] != "ok":
        return [
            Row(
                "Hub",
                "warn",
                hub["state"],
                "local models and prepared folders need no Hub; HF_HUB_OFFLINE=1 asks it nothing",
            )
        ]
    if hub["lacks"]:
        return [Row("Hub", "warn", f"token of {hub['name']}: {hub['lacks']}", login)]
    scopes = f" ({', '.join(hub['scopes'])})" if hub["scopes"] else ""
    return [Row("Hub", "ok", f"token of {hub['name']}, {hub['role'] or 'any'}{scopes}: may push")]
