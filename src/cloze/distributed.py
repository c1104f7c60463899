"""The processes of a run: start them as one world, check that it is the world that was launched, and describe it.

Launchers fail silently: under some flags every rank believes to be alone and trains on the same data, DeepSpeed or
FSDP is dropped, or two worlds of one process start instead of one of two. So `start` compares what it got with what
the launcher was asked for, read from the launcher's own command line, and refuses to train otherwise.

    accelerator = start(RunShape(use_cpu=True, precision="no", gradient_accumulation_steps=2))
    say("world", describe(accelerator))     # 2 ranks on 1 host, DeepSpeed ZeRO-2, fp32, gloo
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs

from cloze.collectives import gather, wait_in_new_groups
from cloze.console import warn
from cloze.environment import processes, requests
from cloze.environment.settle import own_device, settle
from cloze.errors import LaunchError
from cloze.fully_sharded import fsdp_plugin, is_fsdp, keep_on_cpu
from cloze.machine import allow_open_files
from cloze.rendezvous import authenticate_ranks, joining

# Of each other rank: one of a group of gloo, another of `--async_save`, on rank 0 also the store's and the watch's.
SOCKETS_PER_RANK = 4


@dataclass(frozen=True)
class RunShape:
    """What a command asks of its processes. `precision`: "no", "bf16", "fp16" or "fp8"; None takes the launcher's.
    `deepspeed`: DeepSpeed's settings; None takes the launcher's ZeRO stage, if it asks for DeepSpeed."""

    use_cpu: bool = False
    precision: str | None = None
    gradient_accumulation_steps: int = 1
    deepspeed: Mapping[str, Any] | None = None
    timeout_seconds: int = 1800
    log_with: Sequence[str] = ()
    project_dir: str | None = None


@dataclass(frozen=True)
class Launched:
    """What the launcher was asked for; None where it was not said."""

    num_processes: int | None = None
    num_machines: int | None = None
    deepspeed: bool = False
    fsdp: bool = False


def start(shape: RunShape) -> Accelerator:
    """Join the processes and return accelerate's handle to them.

    Raises LaunchError where the world differs from the one that was launched, or cannot do what is asked.
    """
    settle_environment()
    allow_open_files(SOCKETS_PER_RANK * processes.world_size())
    on_cpu = shape.use_cpu or not torch.cuda.is_available()
    wants_deepspeed = shape.deepspeed is not None or requests.wants_deepspeed()
    check_device(on_cpu, wants_deepspeed)
    plugin = fsdp_plugin() if requests.wants_fsdp() else None
    if wants_deepspeed and plugin is not None:
        raise LaunchError("DeepSpeed and FSDP were asked for at once", where="accelerate launch", hint="choose one")
    if on_cpu:
        requests.run_deepspeed_on_cpu()
    if on_cpu and wants_deepspeed:
        _prepare_deepspeed_on_cpu()
    if wants_deepspeed or plugin is not None or processes.is_launched():
        processes.be_alone(os.environ)
    # DeepSpeed still calls collectives by names that torch has deprecated; nobody who trains can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    group = InitProcessGroupKwargs(
        backend="gloo" if on_cpu else "nccl", timeout=timedelta(seconds=shape.timeout_seconds)
    )
    if wants_deepspeed or processes.is_launched():
        wait_in_new_groups(shape.timeout_seconds)
    with joining():
        accelerator = Accelerator(
            cpu=on_cpu and not wants_deepspeed,
            mixed_precision=shape.precision,
            gradient_accumulation_steps=shape.gradient_accumulation_steps,
            deepspeed_plugin=make_deepspeed_plugin(shape.deepspeed) if wants_deepspeed else None,
            fsdp_plugin=plugin,
            kwargs_handlers=[group] * (wants_deepspeed or processes.is_launched()) + _fp8_recipe(shape.precision),
            log_with=list(shape.log_with) or None,
            project_dir=shape.project_dir,
            step_scheduler_with_optimizer=False,
        )
    authenticate_ranks(shape.timeout_seconds)
    if plugin is not None:
        keep_on_cpu(accelerator, plugin)
    if accelerator.device.type != ("cpu" if on_cpu else "cuda"):
        raise LaunchError(
            f"accelerate chose the device {accelerator.device}, and Cloze trains on CPUs and on CUDA GPUs only",
            where="accelerate launch",
            hint="leave its device settings out, or give --use_cpu",
        )
    check_world(accelerator, read_launcher())
    return accelerator


def make_deepspeed_plugin(settings: Mapping[str, Any] | None) -> DeepSpeedPlugin:
    """Make accelerate's handle to DeepSpeed from settings that were checked: it reads no file and no variable."""
    os.environ.pop(requests.DEEPSPEED_FIELDS, None)  # else it refuses variables beside a file; see `check_settings`
    settings = settings or {"zero_optimization": {"stage": requests.zero_stage()}}
    plugin = DeepSpeedPlugin(hf_ds_config={"train_micro_batch_size_per_gpu": "auto", **settings})
    plugin.deepspeed_config |= {name: settings[name] for name in ("steps_per_print",) if name in settings}
    return plugin


def settle_environment() -> None:
    """Refuse or remove, with a line, settings in the environment that would change the run; see
    `cloze.environment.table`. Raises LaunchError."""
    for line in settle(os.environ):
        warn(line)


def check_device(on_cpu: bool, wants_deepspeed: bool) -> None:
    """Make libraries use the device of this run. Raises LaunchError if the environment asks for another one, and for
    more processes than GPUs."""
    if requests.wants_cpu() and wants_deepspeed:
        raise LaunchError(
            "accelerate was told to use the CPU and DeepSpeed at once, and would silently drop DeepSpeed",
            where=f"{requests.USE_CPU} / use_cpu",
            hint="leave use_cpu out: without a GPU, DeepSpeed runs on the CPU by itself",
        )
    if requests.wants_cpu() and not on_cpu:
        hint = "add --use_cpu, or leave use_cpu out of accelerate's settings"
        raise LaunchError("accelerate was told to use the CPU, and there is a GPU", where=requests.USE_CPU, hint=hint)
    asked = requests.deepspeed_device()
    if wants_deepspeed and asked is not None and (asked == "cpu") != on_cpu:
        here = "the CPU" if on_cpu else "a GPU"
        raise LaunchError(
            f"is {asked}, and this run uses {here}", where=requests.DEEPSPEED_DEVICE, hint="leave it out"
        )
    if not on_cpu and processes.is_launched():
        processes.present_device(own_device(torch.cuda.device_count()))


def _fp8_recipe(precision: str | None) -> list[Any]:
    """How accelerate makes linear layers compute in fp8: torchao, each tensor with a scale of its own, first and last
    layer left out. Without FSDP's exchange in fp8, its default, which would put new parameters in the place of those
    that the optimizer has."""
    if precision != "fp8":
        return []
    from accelerate.utils import AORecipeKwargs

    return [AORecipeKwargs(pad_inner_dim=True, enable_fsdp_float8_all_gather=False)]


def check_world(accelerator: Accelerator, launched: Launched) -> None:
    """Raise LaunchError unless the world is the launched one and every rank is there once."""
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
    """What `accelerate launch` above this process was asked for, from its command line (Linux; else nothing)."""
    for arguments in _ancestors():
        words = [Path(word).name for word in arguments[:4]]
        for position, word in enumerate(words):
            via_cli = word == "launch" and any(before.startswith("accelerate") for before in words[:position])
            if via_cli or word in ("accelerate-launch", "accelerate.commands.launch", "cloze.launcher"):
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
    """Command lines of the parent processes, nearest first."""
    lines, pid = [], os.getppid()
    while pid > 1:
        try:
            lines.append(Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0"))
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            break
    return lines


def _prepare_deepspeed_on_cpu() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives (37 s, needs g++); gloo does the same work."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def describe(accelerator: Accelerator) -> str:
    """One line: ranks, hosts, engine, stage, precision, backend."""
    world = accelerator.num_processes
    hosts = len(set(gather(socket.gethostname())))
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else "no process group"
    ranks = f"{world} rank{'s' * (world > 1)} on {hosts} host{'s' * (hosts > 1)}"
    return f"{ranks}, {engine_name(accelerator)}, {precision}, {accelerator.device.type}, {backend}"


def engine_name(accelerator: Accelerator) -> str:
    """`DeepSpeed ZeRO-2`, `FSDP2`, `DDP` or `single process`."""
    if is_fsdp(accelerator):
        return "FSDP2"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"DeepSpeed ZeRO-{zero_stage(accelerator)}"
    return "DDP" if accelerator.num_processes > 1 else "single process"


def zero_stage(accelerator: Accelerator) -> int | None:
    """DeepSpeed's ZeRO stage, None without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return int(accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"])
