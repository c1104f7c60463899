"""Tensors that DeepSpeed's NVMe offload has written to a disk, memory-mapped from its raw files.

Between two steps the fp32 weights, the moments and, with offloaded parameters, each rank's part of them lie in files
under `nvme_path`. DeepSpeed would read a whole sub-group into memory to access a few elements; mapping needs none.

    fit_buffers(settings, model, 2, dtype)     # before DeepSpeed reads them: its buffers have to suffice
    swap = swapped_state(zero, owner)          # None if the optimizer's tensors are in memory
    on_disk(swap, exp_avg)                     # [numel], shared with the file
    swapped_part(parameter)                    # this rank's part of a parameter, in memory or mapped
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from cloze.errors import ConfigError
from cloze.utils.terminal.console import say

_ROUND = 1 << 20  # bytes; DeepSpeed reads whole multiples of 1 KiB times the threads of a request
_LEAST = 1 << 20  # bytes (MIN_AIO_BYTES, or aio.block_size if larger); smaller parts stay in memory


def fit_buffers(settings: dict[str, Any], model: torch.nn.Module, world_size: int, dtype: torch.dtype) -> None:
    """Change DeepSpeed's settings if its buffers for parameters on a disk would not suffice.

    A part keeps its buffer until its parameter is released. DeepSpeed (0.19.8) prefetches and keeps parameters without
    regard to the number of buffers; knowing the order of the modules, in about the third step, it runs out of them and
    fails. If there are fewer buffers than parts, parameters are therefore read when a module needs them and released
    after it. Raises ConfigError if a part exceeds a buffer, or more parts than buffers are needed at once.
    """
    zero = settings["zero_optimization"]
    offload = zero.get("offload_param") or {}
    if offload.get("device") != "nvme":
        return
    count, size = int(offload.get("buffer_count", 5)), int(offload.get("buffer_size", 10**8))  # DeepSpeed's defaults
    least = max(_LEAST, settings.get("aio", {}).get("block_size", _LEAST))
    parts = {name: -(-parameter.numel() // world_size) for name, parameter in model.named_parameters()}
    swapped = {name: part for name, part in parts.items() if part * dtype.itemsize >= least}
    largest = max(swapped, key=lambda name: swapped[name], default=None)
    if largest is not None and swapped[largest] > size:
        raise ConfigError(
            f"a rank's part of {largest} has {swapped[largest]:,} elements, and a buffer {size:,}",
            where="offload_param: buffer_size",
            hint=f"set it to {swapped[largest]} or more",
        )
    if len(swapped) <= count or sum(parts.values()) <= int(offload.get("max_in_cpu", 10**9)):
        return
    most = _most_at_once(model, {model.get_parameter(name) for name in swapped})
    if most > count:
        raise ConfigError(
            f"{most} parameters on the disk are needed at once, and buffers for them: {count}",
            where="offload_param: buffer_count",
            hint=f"set it to {most} or more",
        )
    zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    say("offload", f"{len(swapped)} parameters on the disk, {count} buffers: each is read when its module needs it")


def _most_at_once(model: torch.nn.Module, swapped: set[torch.nn.Parameter]) -> int:
    """Return how many of these parameters are in memory at once, at most: those of one module, or all frozen ones of a
    recomputed layer, which DeepSpeed releases at the end of the layer's backward pass."""
    own = {module: [p for p in module.parameters(recurse=False) if p in swapped] for module in model.modules()}
    most = max(len(found) for found in own.values())
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            frozen = sum(p in swapped and not p.requires_grad for p in layer.parameters())
            trained = max(sum(p.requires_grad for p in own[module]) for module in layer.modules())
            most = max(most, frozen + trained)
    return most


def swapped_state(zero: Any, owner: torch.Tensor) -> Any:
    """Return DeepSpeed's record (OptimizerStateSwapInfo) of an fp32 tensor and its state on a disk; None if they are
    in memory, as small tensors are."""
    swapper = getattr(zero, "optimizer_swapper", None)
    return None if swapper is None else swapper.swap_params_info.get(getattr(owner, "ds_id", None))


def on_disk(swap: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements [numel] of weights or a moment, given the placeholder that DeepSpeed keeps in memory; a
    tensor that is not a placeholder is returned unchanged."""
    for one in swap.tensors:
        if one.compute_tensor is tensor:
            return _map(one.swap_path, swap.numel(), swap.dtype())
    return tensor


def add_tensor(swap: Any, owner: torch.Tensor, key: str) -> torch.Tensor:
    """Add a zero tensor to the optimizer's state on the disk; return its placeholder in memory."""
    tensor = torch.empty(0, dtype=swap.dtype())
    tensor.ds_id = f"{key}-{owner.ds_id}"  # type: ignore[attr-defined]
    swap.add_state_tensors([tensor])
    size = swap.numel() * tensor.element_size()
    with open(swap.tensors[-1].swap_path, "wb") as file:
        os.truncate(file.fileno(), -(-size // _ROUND) * _ROUND)
    return tensor


def forget_state(zero: Any) -> None:
    """Remove the moments on the disk but keep the weights, as `optimizer.state.clear()` does in memory."""
    swapper = getattr(zero, "optimizer_swapper", None)
    for swap in swapper.swap_params_info.values() if swapper is not None else ():
        del swap.tensors[1:]
        swap.has_state_tensors = False


def check_alignment(zero: Any) -> None:
    """Raise ConfigError if DeepSpeed (0.19.8) would fail silently to read gradients back: it writes a file per
    parameter and reads it into the middle of a buffer, but direct reads need addresses that are multiples of 1 KiB
    times the threads of a request."""
    swapper = getattr(zero, "optimizer_swapper", None)
    if swapper is None:
        return
    for group, start, length in zero.grad_position.values():
        swapped = zero._swappable_optimizer_subgroup(group) and swapper.is_swappable_tensor(numel=length)
        if swapped and start % swapper.numel_alignment:
            raise ConfigError(
                f"a rank's gradients begin at element {start} of a buffer, no multiple of {swapper.numel_alignment}",
                where="offload_optimizer: nvme",
                hint="choose a number of processes that divides the model's sizes, or offload the optimizer to cpu",
            )


def swapped_part(parameter: Any) -> torch.Tensor:
    """Return this rank's part of a parameter under ZeRO-3, [ds_tensor.ds_numel], from memory or a disk."""
    swapper = getattr(parameter, "nvme_swapper", None)
    if swapper is None or parameter.ds_tensor.status.name == "AVAILABLE":
        return parameter.ds_tensor
    return _map(swapper.get_path(parameter, must_exist=True), parameter.ds_tensor.ds_numel, swapper.dtype)


def _map(path: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
    storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=numel * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, (numel,))  # type: ignore[call-overload]
