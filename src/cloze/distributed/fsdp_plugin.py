"""FSDP2 as `accelerate launch` asks for it: on GPUs by accelerate, and on CPUs too, where accelerate leaves it out.

    plugin = fsdp_plugin() if requests.wants_fsdp() else None
    accelerator = Accelerator(fsdp_plugin=plugin, ...)
    if plugin is not None:
        keep_on_cpu(accelerator, plugin)

How the model is divided then: `cloze.training.engines.fsdp2`.
"""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from cloze.errors import LaunchError
from cloze.utils.environment import requests

_CONFIG = "launch/accelerate/fsdp2.yaml"


def fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """Return accelerate's settings of FSDP, from what the launcher put into the environment.

    Raises LaunchError for version 1, and for settings that accelerate cannot use. `cloze.utils.environment.settle` has
    refused those under which Cloze does not train.
    """
    if requests.fsdp_version() != "2":
        raise LaunchError(
            "FSDP of version 1 was asked for, and only FSDP2 is supported",
            where="fsdp_version",
            hint=f"use fsdp_version: 2, as {_CONFIG} does",
        )
    try:
        # The model is made on every rank, and nothing that transformers loads later may come out empty on some.
        return FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)
    except (ValueError, KeyError) as error:
        raise LaunchError(f"accelerate's FSDP settings: {error}", where="fsdp_config", hint=f"see {_CONFIG}") from None


def keep_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Make it FSDP on CPUs too. accelerate (1.15, state.py: AcceleratorState) asks for a GPU or the like, and trains
    with DDP without a word otherwise, while torch's FSDP2 works over gloo. What is set here is what it sets there."""
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def is_fsdp(accelerator: Accelerator) -> bool:
    """Return whether weights, gradients and optimizer state are divided by FSDP2."""
    return accelerator.distributed_type == DistributedType.FSDP
