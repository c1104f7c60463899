"""Find this process's rank, the world size and rank 0's address, without heavy imports.

process = find_this_process(os.environ)      # from torchrun and accelerate, from srun, or alone
process.say()                         # "rank 1 on node2"
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from cloze.distributed.secret import secret_port
from cloze.errors import LaunchError
from cloze.utils.environment import processes

FIRST_PORT = 29500


@dataclass(frozen=True)
class ThisProcess:
    """One process among `world_size`. `head`, `port`: where rank 0, or its launcher, listens; `served`: the launcher
    listens there itself, so that rank 0 must not; `launcher`: the program that started it, "" if it is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    head: str = "127.0.0.1"
    port: int = 0
    served: bool = False
    launcher: str = ""

    @property
    def first_on_host(self) -> bool:
        """Return whether this process examines facts that all processes of its machine share."""
        return self.local_rank == 0

    def say(self) -> str:
        """Return it in words: `rank 1 on node2`"""
        return f"rank {self.rank} on {socket.gethostname()}"


def find_this_process(environment: Mapping[str, str]) -> ThisProcess:
    """Read torchrun's and accelerate's variables if they are set, else those of `srun`; else the process is alone.

    Inside `sbatch` but without `srun` it is alone too: only `srun` starts a process for each task. Raises LaunchError
    if a launcher's variables are incomplete.
    """
    if processes.RANK in environment and processes.WORLD_SIZE in environment:
        return _launched(environment)
    task = processes.slurm_task(environment)
    return ThisProcess() if task is None else _by_srun(task, environment)


def _launched(environment: Mapping[str, str]) -> ThisProcess:
    world_size = processes.integer(processes.WORLD_SIZE, 1, environment)
    if world_size == 1:
        return ThisProcess()
    for name in (processes.MASTER_ADDR, processes.MASTER_PORT):
        if name not in environment:
            hint = "start with torchrun, `accelerate launch` or srun, which set it"
            raise LaunchError(f"WORLD_SIZE is {world_size}, but {name} is not set", where="environment", hint=hint)
    return ThisProcess(
        rank=processes.integer(processes.RANK, 0, environment),
        world_size=world_size,
        local_rank=processes.integer(processes.LOCAL_RANK, 0, environment),
        head=environment[processes.MASTER_ADDR],
        port=processes.integer(processes.MASTER_PORT, 0, environment),
        served=processes.launcher_listens(environment),
        launcher="torchrun or accelerate" if processes.is_torchrun(environment) else "a launcher",
    )


def _by_srun(task: processes.SlurmTask, environment: Mapping[str, str]) -> ThisProcess:
    """Return the place of a task: task 0 is on the step's first node. Without MASTER_PORT the port follows from the
    secret, else from the job's number, which others know."""
    secret = environment.get(processes.SECRET)
    port = secret_port(secret, str(task.job)) if secret else FIRST_PORT + task.job % 1000
    return ThisProcess(
        rank=task.number,
        world_size=task.count,
        local_rank=task.local_number,
        head=environment.get(processes.MASTER_ADDR) or first_host(task.nodes),
        port=processes.integer(processes.MASTER_PORT, port, environment),
        launcher="srun",
    )


def first_host(nodes: str) -> str:
    """Return the first of SLURM's list of nodes, `node[03-05,9],big1`: as scontrol says, or where a container has no
    scontrol, from the list's own spelling. Raises LaunchError for an empty list."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=10)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    except (OSError, subprocess.TimeoutExpired):
        pass
    found = re.match(r"([^\[,\s]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if not found:
        raise LaunchError(
            f"cannot read the list of nodes {nodes!r}", where="the step's nodes", hint="start it with srun"
        )
    return "".join(part or "" for part in found.groups())


def announce(process: ThisProcess) -> None:
    """Tell the rest of Cloze, which reads torchrun's variables, which rank this is."""
    values = (process.rank, process.world_size, process.local_rank)
    names = (processes.RANK, processes.WORLD_SIZE, processes.LOCAL_RANK)
    os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})
