"""Which process of how many this is, from the variables that torchrun and accelerate set.

    rank(), world_size(), local_rank(), local_world_size(), is_launched()

These functions never raise, so that an error can be reported in any environment: a value that is not a number counts
as not set. `cloze.utils.environment.settle.check_processes` refuses such values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

RANK, LOCAL_RANK, GROUP_RANK = "RANK", "LOCAL_RANK", "GROUP_RANK"
WORLD_SIZE, LOCAL_WORLD_SIZE = "WORLD_SIZE", "LOCAL_WORLD_SIZE"
MASTER_ADDR, MASTER_PORT = "MASTER_ADDR", "MASTER_PORT"
# Variables of a rank. A child process that is not a rank itself must not see them.
SECRET = "CLOZE_SECRET"
RANK_VARIABLES = (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, SECRET)
# The launcher's LOCAL_RANK, if libraries are given another one (see `present_device`).
LAUNCHED_LOCAL_RANK = "CLOZE_LOCAL_RANK"


def integer(name: str, default: int, environment: Mapping[str, str] | None = None) -> int:
    """Return a variable as a number, or `default` if it is not set or not a number."""
    try:
        return int((os.environ if environment is None else environment).get(name, default))
    except ValueError:
        return default


def rank() -> int:
    """Return the number of this process among all, from 0."""
    return integer(RANK, 0)


def world_size() -> int:
    """Return the number of processes."""
    return integer(WORLD_SIZE, 1)


def local_rank() -> int:
    """Return the number of this process among those of its machine, from 0."""
    return integer(LAUNCHED_LOCAL_RANK, integer(LOCAL_RANK, 0))


def local_world_size() -> int | None:
    """Return the number of processes on this machine, or None if the launcher does not say."""
    return integer(LOCAL_WORLD_SIZE, 0) or None


def group_rank() -> int:
    """Return the number of this machine among all, from 0."""
    return integer(GROUP_RANK, 0)


def is_launched() -> bool:
    """Return whether a launcher has started this process as one of several."""
    return LOCAL_RANK in os.environ


def is_one_host() -> bool:
    """Return whether all processes are on this machine, as far as the launcher says."""
    return world_size() == (local_world_size() or (1 if world_size() == 1 else -1))


def master() -> tuple[str, int]:
    """Return the address and port where rank 0, or its launcher, listens."""
    return os.environ.get(MASTER_ADDR, "127.0.0.1"), integer(MASTER_PORT, 0)


def secret() -> str | None:
    """Return what only the processes of this run know, or None without CLOZE_SECRET."""
    return os.environ.get(SECRET) or None


def launcher_listens(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether the launcher listens at `master` itself, so that rank 0 must not."""
    return (os.environ if environment is None else environment).get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_torchrun(environment: Mapping[str, str]) -> bool:
    """Return whether torchrun, or accelerate on top of it, started this process."""
    return "TORCHELASTIC_RUN_ID" in environment


def restart_count() -> str:
    """Return how often torchrun has started its processes again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def be_alone(environment: MutableMapping[str, str]) -> None:
    """Set the variables of a single process that are not set yet; DeepSpeed and FSDP2 need them.

    Port 0: the operating system chooses a free one. No other process needs to know it.
    """
    values = {RANK: "0", LOCAL_RANK: "0", WORLD_SIZE: "1", MASTER_ADDR: "127.0.0.1", MASTER_PORT: "0"}
    for name, value in values.items():
        environment.setdefault(name, value)


def device_index(local_rank: int, visible: int) -> int:
    """Return the index of the GPU that a process uses, among the `visible` ones.

    A process that sees one GPU uses that one, even if its local rank is higher: SLURM's `--gpus-per-task=1` shows each
    process its own. Raises LookupError for more processes than GPUs.
    """
    if visible <= 1:
        return 0
    if local_rank >= visible:
        raise LookupError(f"process {local_rank} of this machine, but {visible} GPUs are visible")
    return local_rank


def present_device(index: int) -> None:
    """Make libraries use GPU `index`: DeepSpeed takes LOCAL_RANK for it."""
    if is_launched() and integer(LOCAL_RANK, 0) != index:
        os.environ.setdefault(LAUNCHED_LOCAL_RANK, os.environ[LOCAL_RANK])
        os.environ[LOCAL_RANK] = str(index)


# ---- SLURM


def slurm_job() -> str | None:
    """Return the number of the SLURM job that this process runs in, or None outside of one."""
    return os.environ.get("SLURM_JOB_ID") or None


def slurm_cluster() -> str:
    """Return the name of the SLURM cluster, or an empty text outside of one."""
    return os.environ.get("SLURM_CLUSTER_NAME", "")


def slurm_restart() -> int:
    """Return how often the SLURM job has been queued again."""
    return integer("SLURM_RESTART_COUNT", 0)


def launch_identity() -> list[str]:
    """Return what all processes of one launch have in common and no other launch has, the address of rank 0 first."""
    names = (MASTER_ADDR, MASTER_PORT, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return [os.environ.get(name, "") for name in (*names, "SLURM_JOB_ID", "SLURM_RESTART_COUNT")]


def slurm_job_end() -> float | None:
    """Return when the job's time is over, in seconds since the epoch, or None if SLURM did not set it."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdigit() else None


@dataclass(frozen=True)
class SlurmTask:
    """One of several tasks that `srun` started. `nodes`: SLURM's list of the step's nodes."""

    number: int
    count: int
    local_number: int
    nodes: str
    job: int


def slurm_task(environment: Mapping[str, str]) -> SlurmTask | None:
    """Return which task of a step this process is, or None if `srun` did not start several."""
    count = integer("SLURM_STEP_NUM_TASKS", 1, environment)
    if count < 2 or "SLURM_PROCID" not in environment:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    number, local = integer("SLURM_PROCID", 0, environment), integer("SLURM_LOCALID", 0, environment)
    return SlurmTask(number, count, local, nodes, integer("SLURM_JOB_ID", 0, environment))


def slurm_tasks(environment: Mapping[str, str]) -> int:
    """Return the number of tasks that SLURM started this process as one of, or was asked to; 1 outside of SLURM."""
    if "SLURM_STEP_NUM_TASKS" in environment:
        return integer("SLURM_STEP_NUM_TASKS", 1, environment)
    return integer("SLURM_NTASKS", integer("SLURM_NPROCS", 1, environment), environment)
