"""The memory of an engine in addition to the weights that the model computes with.

optimizer_bytes(elements=124_645_632, moments=2, stage=2, half=True)      # 1,495,747,584: fp32 weights and moments
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from cloze.training.engines.sharded_state import local


def has_own_weights(stage: int | None, half: bool) -> bool:
    """Return whether the optimizer has its own fp32 weights. `stage`: of ZeRO, None for DDP; `half`: bf16 or fp16.

    DDP and ZeRO-0 in fp32 step the model's weights. Otherwise DeepSpeed has a copy, also in fp32
    (`single_partition_of_fp32_groups`, `fp32_partitioned_groups_flat`, `fp32_groups`).
    """
    return stage is not None and (half or stage > 0)


def optimizer_bytes(elements: float, moments: float, stage: int | None, half: bool) -> float:
    """Return the bytes for `elements` trained elements of a rank with `moments` tensors each (AdamW: 2; a moving
    average of the weights is one more), all in fp32."""
    return 4 * elements * (moments + has_own_weights(stage, half))


def bytes_of(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Return the bytes of the storages of some tensors on this rank that are not in `seen`, and add them to it."""
    total = 0
    for tensor in tensors:
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def deepspeed_bytes(zero: Any, inner: torch.optim.Optimizer, module: list[Any]) -> dict[str, int]:
    """Return what `Engine.bytes_held` does, of DeepSpeed's optimizer, the one inside it, and a model's parameters."""
    gradients = [p.grad for p in module if p.grad is not None]
    for averaged in (getattr(zero, "averaged_gradients", None) or {}).values():
        gradients += averaged or []
    swapper = getattr(zero, "optimizer_swapper", None)
    for info in swapper.swap_params_info.values() if swapper is not None else []:
        gradients += info.unswapped_gradients.values()  # small ones: with a GPU they are on it
    owners = [p for group in inner.param_groups for p in group["params"]]
    owners += getattr(zero, "fp32_partitioned_groups_flat", [])
    state = [value for entries in inner.state.values() for value in entries.values() if torch.is_tensor(value)]
    flat = getattr(zero, "grad_partitions_flat_buffer", None)
    flat = [] if flat is None else [flat]
    seen: set[int] = set()
    host = 0
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        sums = [p.grad for p in owners if p.grad is not None]
        host = bytes_of([*owners, *sums, *state, *flat, *_in_host(zero, module)], seen)
    parts = [p.ds_tensor for p in module if hasattr(p, "ds_tensor")] + [p.data for p in module]
    return {
        "parameters": bytes_of(parts, seen),
        "gradients": bytes_of([*gradients, *flat], seen),
        "optimizer": bytes_of([*owners, *state], seen),
        "host": host,
    }


def _in_host(zero: Any, module: list[Any]) -> list[torch.Tensor]:
    """Return ZeRO-Offload's buffers in host memory other than weights, gradients and moments of the optimizer, and
    weights that are not on the GPU. The optimizer's swap buffers exist with NVMe only."""
    found = list(getattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups", []))
    found += [getattr(zero, name) for name in ("temp_grad_buffer_for_cpu_offload",) if hasattr(zero, name)]
    found += list(getattr(zero, "accumulated_grads_in_cpu", {}).values())
    if getattr(zero, "offload_param", False):
        found += [p.ds_tensor for p in module if not p.ds_persist]
    swapper = getattr(zero, "optimizer_swapper", None)
    if swapper is not None:
        found += swapper.swap_buffer_manager.all_buffers
        found.append(module[0].nvme_swapper.buffers)
    return found
