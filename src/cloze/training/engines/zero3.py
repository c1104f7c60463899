"""ZeRO-3 from the first weight on: no process holds the whole model in private memory.

    partition(model, deepspeed_settings, torch.bfloat16)    # each rank keeps its share, parameter by parameter

The model comes from `cloze.training.build_model`, in mapped files. DeepSpeed's `zero.Init`, which divides modules
while they are constructed, would give other weights than the other engines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cloze.errors import ConfigError
from cloze.training.engines.deepspeed_file import engine_settings
from cloze.training.engines.deepspeed_ops import load_op
from cloze.utils.atomic_files import disk_errors
from cloze.utils.environment import processes, requests

_QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def asked_zero(deepspeed: str | None) -> dict[str, Any] | None:
    """Return `zero_optimization` of the DeepSpeed settings that `--deepspeed` or the launcher names, before any
    process has joined; None without DeepSpeed. Raises ConfigError for a file that cannot be read, or has no stage."""
    settings = engine_settings(deepspeed)
    return None if settings is None else dict(settings["zero_optimization"])


def check_zero(deepspeed: str | None, on_gpu: bool) -> None:
    """Raise ConfigError for ZeRO options that need more than this machine or number of processes has: libaio for
    offload to a disk, the requirements of ZeRO++ (Wang et al. 2023)."""
    zero = asked_zero(deepspeed) or {}
    where = deepspeed or requests.deepspeed_file()
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name) or {}
        if offload.get("device") == "nvme":
            if not on_gpu:
                requests.run_deepspeed_on_cpu()
            _check_disk(offload.get("nvme_path"), f"{where}: {name}")
    quantized = [name for name in _QUANTIZED if zero.get(name)]
    if quantized and not on_gpu:
        hint = "leave it out: without a network between GPUs it saves nothing"
        raise ConfigError(f"{quantized[0]} needs CUDA kernels", where=where, hint=hint)
    group, world_size = int(zero.get("zero_hpz_partition_size", 1)), processes.world_size()
    if (quantized or group > 1) and zero.get("stage") != 3:
        raise ConfigError(
            f"ZeRO++ is a part of ZeRO-3, not of stage {zero.get('stage')}",
            where=where,
            hint="set stage to 3, or take it out",
        )
    if world_size % group:
        hint = "it is the number of processes of a machine"
        raise ConfigError(
            f"{world_size} processes are no multiple of zero_hpz_partition_size={group}", where=where, hint=hint
        )


def _check_disk(nvme_path: str | None, where: str) -> None:
    if nvme_path is None:
        raise ConfigError("offload to a disk needs a nvme_path", where=where, hint="name a folder on a local disk")
    with disk_errors(nvme_path):
        Path(nvme_path).mkdir(parents=True, exist_ok=True)
        if not os.access(nvme_path, os.W_OK):
            raise ConfigError(f"{nvme_path} is not ours to write", where=where, hint="name a folder on a local disk")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        hint = "apt-get install libaio-dev g++ (libaio-devel on Red Hat), or offload to cpu"
        raise ConfigError("offload to a disk needs libaio, which is not here", where=where, hint=hint)
    load_op(AsyncIOBuilder(), "offload to a disk")  # before the processes join: others would wait in a collective


def partition(model: torch.nn.Module, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Divide the parameters among the ranks, one after the other, releasing each whole tensor; every rank calls it.

    `settings`: DeepSpeed's, with batch sizes; `dtype`: what the model computes with.
    """
    import deepspeed

    known = {name: settings[name] for name in settings if name.startswith("train_") or name == "aio"}
    zero = {name: value for name, value in settings["zero_optimization"].items() if value != "auto"}
    known |= {"gradient_accumulation_steps": settings["gradient_accumulation_steps"], "zero_optimization": zero}
    deepspeed.zero.Init(module=_OneByOne(model, dtype), config_dict_or_path=known, dtype=dtype)


class _OneByOne(torch.nn.Module):
    """Yields another model's parameters one at a time in `dtype`: DeepSpeed divides each before it takes the next."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype):
        super().__init__()
        self._parameters_of, self._dtype = model.parameters, dtype

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        for parameter in self._parameters_of():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self._dtype)
            yield parameter
