"""The choices that are weighed, and DeepSpeed's settings for each: those of ds_configs/*.json.

    choice = Choice(stage=3, offload="optimizer", checkpointing=True)     # zero3+offload+checkpointing
    ds_config(choice)["zero_optimization"]["offload_optimizer"]           # {"device": "cpu", "pin_memory": True}
    sizes = bucket_sizes(ds_config(choice), hidden_size=768)              # what "auto" comes to

The settings stand here as well as in ds_configs/, which an installed package does not have; a test compares them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

_SUFFIX = {"none": "", "optimizer": "+offload", "all": "+offload_params", "nvme": "+nvme"}
_FP16 = {
    "enabled": "auto",
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
_STAGE_1_2 = {
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": "auto",
    "reduce_scatter": True,
    "allgather_partitions": True,
    "allgather_bucket_size": 200000000,
}
_STAGE_3 = {
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1000000000,
    "stage3_max_reuse_distance": 1000000000,
    "sub_group_size": 1000000000,
    "stage3_gather_16bit_weights_on_model_save": False,
}
_NVME = {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True}
_AIO = {
    "block_size": 1048576,
    "queue_depth": 8,
    "intra_op_parallelism": 1,
    "single_submit": False,
    "overlap_events": True,
}


@dataclass(frozen=True)
class Choice:
    """How a run is set up. `stage`: of ZeRO; None for DDP (one process: nothing at all), and for FSDP2, which is
    `fully_sharded`. `offload`: what is kept in host memory: nothing, the optimizer, optimizer and weights; or both on
    NVMe. `checkpointing`: whether activations are computed anew in the backward pass."""

    stage: int | None
    offload: str = "none"
    checkpointing: bool = False
    fully_sharded: bool = False

    @property
    def engine(self) -> str:
        """Return the engine's name: `ddp`, `zero2`, `zero3+offload`, `fsdp2`, ..."""
        if self.fully_sharded:
            return "fsdp2"
        return "ddp" if self.stage is None else f"zero{self.stage}{_SUFFIX[self.offload]}"

    @property
    def name(self) -> str:
        """Return what --choose takes: the engine, and `+checkpointing` where activations are recomputed."""
        return self.engine + ("+checkpointing" if self.checkpointing else "")


def all_choices(with_checkpointing: bool, on_gpu: bool, with_fsdp: bool = True) -> list[Choice]:
    """Return every choice, from the least partitioned on; each without recomputation first. Without a GPU there is
    nowhere to offload to. `with_fsdp`: whether FSDP2 can be one, which has neither fp16 nor fp8 here."""
    engines = [(None, "none"), (0, "none"), (1, "none"), (2, "none"), (3, "none")]
    if on_gpu:
        engines += [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all"), (3, "nvme")]
    again = (False, True) if with_checkpointing else (False,)
    found = [Choice(stage, offload, one) for stage, offload in engines for one in again]
    return found + [Choice(None, "none", one, fully_sharded=True) for one in again if with_fsdp]


def ds_config(choice: Choice) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a choice with a stage, "auto" where accelerate fills in."""
    zero: dict[str, Any] = {"stage": choice.stage}
    if choice.stage:
        zero |= _STAGE_3 if choice.stage == 3 else _STAGE_1_2
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": _FP16,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "steps_per_print": 1000000000,
        "wall_clock_breakdown": False,
    }
    cpu = {"device": "cpu", "pin_memory": True}
    if choice.offload != "none":
        config["zero_force_ds_cpu_optimizer"] = False
        zero["offload_optimizer"] = cpu
    if choice.offload == "all":
        zero["offload_param"] = cpu
    if choice.offload == "nvme":
        zero["offload_optimizer"] = {**_NVME, "buffer_count": 4}
        zero["offload_param"] = {**_NVME, "buffer_count": 5, "buffer_size": 100000000, "max_in_cpu": 1000000000}
        config["aio"] = _AIO
    return copy.deepcopy(config)


@dataclass(frozen=True)
class Sizes:
    """Elements: of a bucket of gradients, of weights that are fetched ahead (ZeRO-3), up to which a parameter stays
    whole (ZeRO-3), within which a weight that is needed again is not let go (ZeRO-3), and of an optimizer's sub-group
    (ZeRO-3)."""

    reduce_bucket: int
    prefetch_bucket: int
    persistence: int
    reuse_distance: int
    sub_group: int


def bucket_sizes(config: dict[str, Any], hidden_size: int | None) -> Sizes:
    """Return what DeepSpeed will use: the file's values, for "auto" accelerate's formulas
    (Accelerator._prepare_deepspeed: h^2, 0.9 h^2, 10 h), and if a model has no hidden size DeepSpeed's defaults
    (runtime/zero/config.py)."""
    zero = config["zero_optimization"]
    width = hidden_size or 0
    automatic = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    usual = {
        "reduce_bucket_size": 5 * 10**8,
        "stage3_prefetch_bucket_size": 5 * 10**7,
        "stage3_param_persistence_threshold": 10**5,
        "stage3_max_reuse_distance": 10**9,
        "sub_group_size": 10**9,
    }

    def size(name: str) -> int:
        value = zero.get(name, usual[name])
        return int((automatic[name] if hidden_size else usual[name]) if value == "auto" else value)

    return Sizes(*(size(name) for name in (
        "reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
        "stage3_max_reuse_distance", "sub_group_size",
    )))  # fmt: skip
