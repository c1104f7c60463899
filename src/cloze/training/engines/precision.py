"""The precision of a run: requested by flag, DeepSpeed file or launcher, else chosen for the GPU.

    choose_precision(config, os.environ, capability=(8, 0), model_type="roberta")   # ("bf16", "bf16 (this GPU ...")

Weights and optimizer state are fp32 in all of them. Names are accelerate's: "no" is fp32.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cloze.config import TrainConfig
from cloze.errors import ConfigError
from cloze.model.archs import NO_BF16
from cloze.training.engines.deepspeed_file import asked_settings
from cloze.utils.environment import requests
from cloze.utils.environment.settle import own_device

PRECISIONS = ("no", "bf16", "fp16", "fp8")
Capability = tuple[int, int]  # of a CUDA GPU: (7, 0) Volta, (7, 5) Turing, (8, 0) Ampere, (8, 9) Ada, (9, 0) Hopper


def choose_precision(
    config: TrainConfig,
    environment: Mapping[str, str],
    capability: Capability | None,
    model_type: str,
    possible: Sequence[str] = PRECISIONS,
) -> tuple[str, str | None]:
    """Return the precision ("no", "bf16", "fp16", "fp8") and, if a GPU's default was chosen, a line with the reason.

    `capability`: of this process's CUDA GPU, None without one; `possible`: see `left_by_deepspeed`. In order of
    precedence: --bf16 and --fp16, --precision, what the DeepSpeed file fixes, the launcher (whose default "no" is
    ignored). Raises ConfigError for flags that contradict each other or the DeepSpeed file, or if this machine lacks
    the precision.
    """
    asked, where = _asked(config)
    if asked is not None and asked not in possible:
        raise ConfigError(
            f"{precision_name(asked)}, but the DeepSpeed configuration leaves {precision_name(possible[0])}",
            where=where,
            hint='leave the flag out, or write "enabled": "auto" there',
        )
    launcher = requests.launcher_precision(environment)
    if asked is None and ("no" not in possible or len(possible) == 1):
        asked, where = possible[0], "the DeepSpeed configuration"
    elif asked is None and launcher in possible and launcher != "no":
        asked, where = launcher, requests.MIXED_PRECISION
    if asked is not None:
        _check_possible(asked, where, capability)
        unused = _asked(config)[0] is None and launcher not in ("no", asked)
        why = f"{precision_name(asked)}, as set by {where}; {requests.MIXED_PRECISION}={launcher} is not used"
        return asked, why if unused else None
    if capability is None:
        return "no", None
    if model_type in NO_BF16:
        return "no", f"fp32 ({model_type} cannot be trained in bf16)"
    if capability >= (8, 0) and "bf16" in possible:
        return "bf16", "bf16 (this GPU is fast in it; weights stay fp32; --precision fp32 to turn it off)"
    if capability < (8, 0) and "fp16" in possible:
        return (
            "fp16",
            "fp16 (this GPU has no bf16; the loss is scaled, weights stay fp32; --precision fp32 to turn it off)",
        )
    return "no", "fp32 (as the DeepSpeed configuration leaves it)"


def _asked(config: TrainConfig) -> tuple[str | None, str]:
    """Return the precision that the flags request, None without one, and the name of the flag."""
    short = "bf16" if config.bf16 else "fp16" if config.fp16 else None
    if config.bf16 and config.fp16:
        raise ConfigError("choose one", where="--bf16 and --fp16")
    if short is not None and config.precision not in ("auto", short):
        raise ConfigError("choose one", where=f"--{short} and --precision {config.precision}")
    if short is not None:
        return short, f"--{short}"
    return {"auto": None, "fp32": "no"}.get(config.precision, config.precision), "--precision"


def _check_possible(asked: str, where: str, capability: Capability | None) -> None:
    if asked == "fp16" and capability is None:
        raise ConfigError("fp16 needs a GPU", where=where, hint="use bf16 or fp32")
    if asked == "fp8" and (capability is None or capability < (8, 9)):
        here = "none is used here" if capability is None else f"this one has {capability[0]}.{capability[1]}"
        raise ConfigError(
            f"fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or more, and {here}",
            where=where,
            hint="use bf16",
        )


def precision_here(config: TrainConfig, model_type: str) -> tuple[str, str | None]:
    """Return `choose_precision` on this machine. Raises ConfigError also if fp8 is requested without torchao."""
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    capability = torch.cuda.get_device_capability(own_device(torch.cuda.device_count())) if on_gpu else None
    settings = asked_settings(config.deepspeed) or {}
    precision, why = choose_precision(config, os.environ, capability, model_type, left_by_deepspeed(settings))
    # Not Transformer Engine: accelerate's conversion to it copies weights, which unties a tied decoder.
    if precision == "fp8" and importlib.util.find_spec("torchao") is None:
        raise ConfigError("fp8 needs torchao", where="--precision", hint="`pip install torchao` for it, or use bf16")
    return precision, why


def precision_of_any_model(config: TrainConfig) -> str:
    """Return the precision that `precision_here` gives for every architecture; "no" if they differ."""
    found = {precision_here(config, model_type)[0] for model_type in ("", *NO_BF16)}
    return found.pop() if len(found) == 1 else "no"


def left_by_deepspeed(settings: Mapping[str, Any]) -> list[str]:
    """Return the precisions that a DeepSpeed configuration allows, the one it fixes first.

    accelerate fills in "auto" and missing values, and keeps `true` and `false`. fp8 is bf16 to DeepSpeed.
    """
    enabled = {name: settings.get(name, {}).get("enabled", "auto") for name in ("bf16", "fp16")}
    if enabled["bf16"] is True:
        return ["bf16", "fp8"]
    if enabled["fp16"] is True:
        return ["fp16"]
    return ["no", *(["bf16", "fp8"] if enabled["bf16"] else []), *(["fp16"] if enabled["fp16"] else [])]


def precision_name(precision: str) -> str:
    """Return the name to display: "fp32" for accelerate's "no"."""
    return {"no": "fp32"}.get(precision, precision)
