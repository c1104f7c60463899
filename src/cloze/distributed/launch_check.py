"""Compare the launcher's request with the processes that exist."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from cloze.distributed.collectives import gather
from cloze.distributed.fsdp_plugin import is_fsdp
from cloze.errors import LaunchError
from cloze.utils.environment import processes


@dataclass(frozen=True)
class Launched:
    """The launcher's request; None for values that it does not state."""

    num_processes: int | None = None
    num_machines: int | None = None
    deepspeed: bool = False
    fsdp: bool = False


def check_world(accelerator: Accelerator, launched: Launched) -> None:
    """Raise LaunchError unless the world is the launched one and contains every rank once."""
    expected = processes.world_size()
    seen = accelerator.num_processes
    if seen != expected:
        raise LaunchError(
            f"accelerate sees {seen} processes, but {expected} were started (WORLD_SIZE)",
            hint="start with `accelerate launch`, torchrun or srun, and set no ACCELERATE_* yourself",
        )
    if launched.num_processes is not None and launched.num_processes != seen:
        machines = f" on {launched.num_machines} machines" if launched.num_machines else ""
        raise LaunchError(
            f"{launched.num_processes} processes{machines} were launched, but this world has {seen}",
            hint="with DeepSpeed on several machines add --deepspeed_multinode_launcher standard --machine_rank R "
            "--main_process_ip HOST; on CPUs without DeepSpeed use --multi_gpu --rdzv_backend static",
        )
    if launched.deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise LaunchError(
            "DeepSpeed was asked for, but accelerate dropped it",
            where="accelerate launch",
            hint="remove use_cpu from its settings",
        )
    if launched.fsdp and not is_fsdp(accelerator):
        raise LaunchError(
            "FSDP was asked for, but accelerate dropped it",
            where="accelerate launch",
            hint="remove use_cpu from its settings",
        )
    if torch.distributed.is_initialized():
        ranks = gather(accelerator.process_index)
        if sorted(ranks) != list(range(seen)):
            raise LaunchError(
                f"every rank must be there once, but the ranks are {ranks}",
                hint="give each machine another --machine_rank",
            )


def read_launcher() -> Launched:
    """Return the request of `accelerate launch` above this process, from its command line (only on Linux)."""
    for arguments in _ancestors():
        words = [Path(word).name for word in arguments[:4]]
        for position, word in enumerate(words):
            via_cli = word == "launch" and any(before.startswith("accelerate") for before in words[:position])
            if via_cli or word in ("accelerate-launch", "accelerate.commands.launch", "cloze.tools.launch.launcher"):
                return _read_accelerate(arguments[position + 1 :])
    return Launched()


def _read_accelerate(arguments: list[str]) -> Launched:
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    args, _ = launch_command_parser().parse_known_args(arguments)
    file = args.config_file or (default_config_file if os.path.isfile(default_config_file) else None)
    saved = load_config_from_file(file) if file else None
    num_processes = args.num_processes or getattr(saved, "num_processes", None)
    num_machines = args.num_machines or getattr(saved, "num_machines", None)
    kind = getattr(getattr(saved, "distributed_type", None), "value", None)
    other = args.multi_gpu or args.cpu
    return Launched(
        num_processes=num_processes if num_processes and num_processes > 0 else None,
        num_machines=num_machines,
        deepspeed=bool(args.use_deepspeed) or (kind == "DEEPSPEED" and not other and not args.use_fsdp),
        fsdp=bool(args.use_fsdp) or (kind == "FSDP" and not other and not args.use_deepspeed),
    )


def _ancestors() -> list[list[str]]:
    """Return the command lines of the parent processes, nearest first."""
    lines, pid = [], os.getppid()
    while pid > 1:
        try:
            lines.append(Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0"))
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            break
    return lines
