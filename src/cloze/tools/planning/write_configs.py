"""The files of a choice: what `accelerate launch --config_file` and DeepSpeed read.

write_configs("launch/mine", row, plan, ...)     # ds_config.json (for DeepSpeed) and accelerate.yaml, or nothing
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from cloze.config import PlanConfig
from cloze.errors import ConfigError
from cloze.tools.planning.choose import Plan, Row
from cloze.tools.planning.settings import ds_config
from cloze.utils.atomic_files import staged_folder, write_json, write_text

# As in launch/accelerate/fsdp2.yaml; cloze train finds the layers by itself.
FSDP_CONFIG = {
    "fsdp_version": 2,
    "fsdp_reshard_after_forward": True,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": False,
}
DEEPSPEED_FILE, ACCELERATE_FILE = "ds_config.json", "accelerate.yaml"


def write_configs(folder: str, row: Row, plan: Plan, config: PlanConfig) -> None:
    """Write the folder atomically. Raises ConfigError if it exists already, and DiskError."""
    if Path(folder).exists():
        raise ConfigError("is there already", where=f"--write {folder}", hint="give a folder that is not")
    with staged_folder(folder) as staged:
        if row.choice.stage is not None:
            write_json(staged / DEEPSPEED_FILE, ds_config(row.choice))
        head = f"# {row.choice.name} for {config.recipe} on {plan.ranks} x {plan.gpu.name}, by `cloze plan`:\n#\n"
        command = f"#   {command_line(folder, row, plan, config)}\n#\n"
        paths = "# The path below is relative to the working folder of the command.\n" * (row.choice.stage is not None)
        text = yaml.safe_dump(accelerate_config(folder, row, plan), sort_keys=False)
        write_text(staged / ACCELERATE_FILE, head + command + paths + text)


def accelerate_config(folder: str, row: Row, plan: Plan) -> dict[str, Any]:
    """Return what accelerate is to read: see launch/accelerate/*.yaml."""
    several = plan.ranks > 1
    kind = "DEEPSPEED" if row.choice.stage is not None else "NO" if not several else "MULTI_GPU"
    if row.choice.fully_sharded:
        kind = "FSDP"
    found: dict[str, Any] = {"compute_environment": "LOCAL_MACHINE", "distributed_type": kind}
    if kind == "MULTI_GPU":
        found["gpu_ids"] = "all" if plan.gpu.is_gpu else ",".join(["-1"] * plan.ranks)
    if row.choice.stage is not None:
        found["deepspeed_config"] = {
            "deepspeed_config_file": str(Path(folder) / DEEPSPEED_FILE),
            "zero3_init_flag": False,  # it would give other initial weights than every other engine
        }
        if plan.nodes > 1:  # else accelerate looks for pdsh, and trains on each machine for itself
            found["deepspeed_config"]["deepspeed_multinode_launcher"] = "standard"
    else:
        found["mixed_precision"] = "no"  # cloze train then chooses
    if row.choice.fully_sharded:
        found["fsdp_config"] = dict(FSDP_CONFIG)
    found["use_cpu"] = False  # `true` would make accelerate drop DeepSpeed; without a GPU a CPU is used anyway
    found |= {"num_processes": plan.ranks, "num_machines": plan.nodes, "machine_rank": 0}
    if plan.nodes > 1:
        found |= {"main_process_ip": "first-machine", "main_process_port": 29500}
    else:
        found["main_process_port"] = 0  # a free one
    return found | {
        "rdzv_backend": "static",
        "same_network": True,
        "main_training_function": "main",
        "debug": False,
        "dynamo_config": {},
        "enable_cpu_affinity": False,
    }


def command_line(folder: str, row: Row, plan: Plan, config: PlanConfig) -> str:
    """Return the command that trains so."""
    words = ["accelerate", "launch", "--config_file", str(Path(folder) / ACCELERATE_FILE)]
    if plan.nodes > 1:
        words += ["--machine_rank", "R", "--main_process_ip", "HOST"]
    words += ["-m", "cloze", "train", "--config", config.recipe, *shlex.split(config.train_flags)]
    return shlex.join([*words, *row.flags])
