"""Join the processes of a run, check the result against the launch command, and describe it.

Launchers can fail silently: with some flags every rank runs alone on the same data, DeepSpeed or FSDP is ignored, or
two worlds of one process start instead of one of two. So `start` compares the world with the launcher's own command
line, and refuses to train if they differ.

    accelerator = start(RunShape(use_cpu=True, precision="no", gradient_accumulation_steps=2))
    say("world", describe(accelerator, "DeepSpeed ZeRO-2"))     # 2 ranks on 1 host, DeepSpeed ZeRO-2, fp32, gloo
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

from cloze.distributed.collectives import gather, wait_in_new_groups
from cloze.distributed.fsdp_plugin import fsdp_plugin, keep_on_cpu
from cloze.distributed.launch_check import check_world, read_launcher
from cloze.distributed.rendezvous import authenticate_ranks, joining
from cloze.errors import LaunchError
from cloze.utils.environment import processes, requests
from cloze.utils.environment.settle import own_device, settle
from cloze.utils.system import allow_open_files
from cloze.utils.terminal.console import warn

# For each other rank: one of a gloo group, one of `--async_save`, and on rank 0 those of the store and the watch.
SOCKETS_PER_RANK = 4


@dataclass(frozen=True)
class RunShape:
    """A command's requirements on its processes. `precision`: "no", "bf16", "fp16" or "fp8"; None: the launcher's.
    `deepspeed`: DeepSpeed's settings; None: the launcher's ZeRO stage, if it asks for DeepSpeed."""

    use_cpu: bool = False
    precision: str | None = None
    gradient_accumulation_steps: int = 1
    deepspeed: Mapping[str, Any] | None = None
    timeout_seconds: int = 1800
    log_with: Sequence[str] = ()
    project_dir: str | None = None


def start(shape: RunShape) -> Accelerator:
    """Join the processes and return the Accelerator.

    Raises LaunchError if the world differs from the launched one, or does not support the request.
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
    # DeepSpeed calls collectives by names that torch has deprecated; users cannot act on the warnings.
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
    """Return accelerate's DeepSpeed plugin for checked settings; it reads no file and no variable."""
    os.environ.pop(requests.DEEPSPEED_FIELDS, None)  # it refuses variables beside a file; see `check_settings`
    settings = settings or {"zero_optimization": {"stage": requests.zero_stage()}}
    plugin = DeepSpeedPlugin(hf_ds_config={"train_micro_batch_size_per_gpu": "auto", **settings})
    plugin.deepspeed_config |= {name: settings[name] for name in ("steps_per_print",) if name in settings}
    return plugin


def settle_environment() -> None:
    """Refuse or remove, with a line, environment settings that would change the run; see
    `cloze.utils.environment.table`. Raises LaunchError."""
    for line in settle(os.environ):
        warn(line)


def check_device(on_cpu: bool, wants_deepspeed: bool) -> None:
    """Make libraries use the device of this run. Raises LaunchError if the environment asks for another device, or if
    there are more processes than GPUs."""
    if requests.wants_cpu() and wants_deepspeed:
        raise LaunchError(
            "accelerate is set to use both the CPU and DeepSpeed, and would silently ignore DeepSpeed",
            where=f"{requests.USE_CPU} / use_cpu",
            hint="leave use_cpu out: without a GPU, DeepSpeed runs on the CPU by itself",
        )
    if requests.wants_cpu() and not on_cpu:
        hint = "add --use_cpu, or leave use_cpu out of accelerate's settings"
        raise LaunchError("accelerate is set to use the CPU, but there is a GPU", where=requests.USE_CPU, hint=hint)
    asked = requests.deepspeed_device()
    if wants_deepspeed and asked is not None and (asked == "cpu") != on_cpu:
        here = "the CPU" if on_cpu else "a GPU"
        raise LaunchError(
            f"is {asked}, and this run uses {here}", where=requests.DEEPSPEED_DEVICE, hint="leave it out"
        )
    if not on_cpu and processes.is_launched():
        processes.present_device(own_device(torch.cuda.device_count()))


def _fp8_recipe(precision: str | None) -> list[Any]:
    """Return accelerate's fp8 settings: torchao with tensorwise scales, first and last layer excluded. FSDP's exchange
    in fp8 is off, because it would replace the parameters that the optimizer holds."""
    if precision != "fp8":
        return []
    from accelerate.utils import AORecipeKwargs

    return [AORecipeKwargs(pad_inner_dim=True, enable_fsdp_float8_all_gather=False)]


def _prepare_deepspeed_on_cpu() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives (37 s, needs g++); gloo does the same work."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def describe(accelerator: Accelerator, engine: str) -> str:
    """Return one line with ranks, hosts, engine, stage, precision and backend."""
    world = accelerator.num_processes
    hosts = len(set(gather(socket.gethostname())))
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else "no process group"
    ranks = f"{world} rank{'s' * (world > 1)} on {hosts} host{'s' * (hosts > 1)}"
    return f"{ranks}, {engine}, {precision}, {accelerator.device.type}, {backend}"
