"""What a launcher asks for in the environment: an engine, its settings, a precision, the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

USE_DEEPSPEED, USE_FSDP, USE_CPU = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_CPU"
DEEPSPEED_FIELDS = "ACCELERATE_CONFIG_DS_FIELDS"
DEEPSPEED_FILE, MIXED_PRECISION = "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_MIXED_PRECISION"
ZERO_STAGE, FSDP_VERSION = "ACCELERATE_DEEPSPEED_ZERO_STAGE", "FSDP_VERSION"
OFFLOAD_DEVICES = ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE")
OFFLOAD_FOLDERS = tuple(name.replace("DEVICE", "NVME_PATH") for name in OFFLOAD_DEVICES)
DEEPSPEED_DEVICE = "DS_ACCELERATOR"


def is_true(value: str | None) -> bool:
    """Return whether accelerate takes a value for true."""
    return (value or "").strip().lower() in ("1", "true", "yes", "y", "t", "on")


def flag(name: str) -> bool:
    """Return whether a variable is set and true."""
    return is_true(os.environ.get(name))


def wants_deepspeed() -> bool:
    """Return whether the launcher asks for DeepSpeed."""
    return flag(USE_DEEPSPEED)


def wants_fsdp() -> bool:
    """Return whether the launcher asks for FSDP, of either version."""
    return flag(USE_FSDP)


def wants_cpu() -> bool:
    """Return whether the launcher asks for the CPU."""
    return flag(USE_CPU)


def fsdp_version() -> str:
    """Return the version of FSDP that the launcher asks for."""
    return os.environ.get(FSDP_VERSION, "1")


def deepspeed_file(environment: Mapping[str, str] | None = None) -> str | None:
    """Return the path of the launcher's DeepSpeed configuration, or None without one."""
    path = (os.environ if environment is None else environment).get(DEEPSPEED_FILE)
    return None if path in (None, "", "none", "None") else path


def zero_stage() -> int:
    """Return the ZeRO stage that the launcher asks for without a DeepSpeed configuration."""
    try:
        return int(os.environ.get(ZERO_STAGE, "2"))
    except ValueError:
        return 2


def zero_settings() -> dict[str, Any]:
    """Return `zero_optimization` as the launcher asks for it without a DeepSpeed configuration."""
    settings: dict[str, Any] = {"stage": zero_stage()}
    for device, folder in zip(OFFLOAD_DEVICES, OFFLOAD_FOLDERS, strict=True):
        if os.environ.get(device, "none").lower() != "none":
            part = {"device": os.environ[device].lower(), "nvme_path": os.environ.get(folder)}
            part = {key: value for key, value in part.items() if value not in (None, "", "none")}
            settings["offload_param" if "PARAM" in device else "offload_optimizer"] = part
    return settings


def unread_beside_file(file: str, stage: Any) -> list[str]:
    """Return the launcher's settings, `NAME=value`, that differ from a DeepSpeed configuration: the `file` counts."""
    names = [name for name in (*OFFLOAD_DEVICES, *OFFLOAD_FOLDERS) if os.environ.get(name, "none").lower() != "none"]
    names += [ZERO_STAGE] if os.environ.get(ZERO_STAGE, str(stage)) != str(stage) else []
    names += [DEEPSPEED_FILE] if deepspeed_file() not in (None, file) else []
    return [f"{name}={os.environ[name]}" for name in names]


def launcher_precision(environment: Mapping[str, str]) -> str:
    """Return the launcher's precision in accelerate's words; "no" is its default and asks for nothing."""
    return environment.get(MIXED_PRECISION, "no").lower()


def offload_devices(environment: Mapping[str, str]) -> set[str]:
    """Return where the launcher's DeepSpeed flags put optimizer state and weights: `none`, `cpu`, `nvme`."""
    return {environment.get(name, "none") for name in OFFLOAD_DEVICES}


def run_deepspeed_on_cpu() -> None:
    """Make DeepSpeed use the CPU, without its warning that there is no GPU."""
    os.environ.setdefault(DEEPSPEED_DEVICE, "cpu")


def deepspeed_device() -> str | None:
    """Return the device that DeepSpeed is told to use, or None if it is not."""
    return os.environ.get(DEEPSPEED_DEVICE)
