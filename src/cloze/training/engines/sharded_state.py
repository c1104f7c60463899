"""The training state per parameter, independent of the engine that holds it.

Every engine keeps the fp32 weight of each trainable parameter and its optimizer state: DDP in the parameter itself,
FSDP2 in rows of it, ZeRO-1/2 in one flat tensor per parameter group of which each rank has a piece, ZeRO-3 in flat
tensors of padded pieces. `Engine.fragments` returns, for this rank, which part of which parameter lies at which place:

    parameter `name`, elements [offset, offset + length)   <->   owner.view(-1)[start : start + length]

`owner` is the tensor under which the inner optimizer keeps its state (of which FSDP2 has rows on each rank).
Checkpoints need no more, so any engine at any world size reads what another wrote. Tensors on a disk (DeepSpeed's NVMe
offload) are mapped between steps: see `cloze.training.engines.nvme_offload`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from cloze.checkpoint.format import EMA, NUMBERS, WEIGHT
from cloze.model.mapped import zeros_in_file
from cloze.training.engines.nvme_offload import add_tensor, on_disk


@dataclass(frozen=True)
class Fragment:
    """A run of elements of one parameter on this rank. `swap`: DeepSpeed's record of an owner on a disk, else None."""

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    owner: torch.Tensor
    start: int
    swap: Any = None

    def view(self, key: str, state: dict[torch.Tensor, dict[str, Any]]) -> torch.Tensor:
        """Return the elements, [length], of the weight or of one of the optimizer's tensors."""
        whole = self.owner if key == WEIGHT else state[self.owner][key]
        whole = local(whole) if self.swap is None else on_disk(self.swap, whole).detach()
        return whole.view(-1).narrow(0, self.start, self.length)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, sharing its memory: rows of it under FSDP2, else all of it."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()  # type: ignore[attr-defined]


def tensor_keys(fragment: Fragment, state: dict[torch.Tensor, dict[str, Any]]) -> list[str]:
    """Return the names of the optimizer's tensors with one element per element of the owner (exp_avg, ...)."""
    sizes = {fragment.owner.shape}
    if fragment.swap is not None:  # placeholders of tensors on a disk are empty
        sizes.add(torch.Size([fragment.swap.numel()]))
    entries = state.get(fragment.owner, {}).items()
    return sorted(
        key for key, value in entries if torch.is_tensor(value) and value.shape in sizes and key not in NUMBERS
    )


def scalars(owner: torch.Tensor, state: dict[torch.Tensor, dict[str, Any]]) -> dict[str, float]:
    """Return the optimizer's scalars for `owner` (`step`)."""
    entries = state.get(owner, {}).items()
    return {
        key: float(value)
        for key, value in sorted(entries)
        if isinstance(value, int | float)
        or (torch.is_tensor(value) and value.numel() == 1 and (key in NUMBERS or value.shape != owner.shape))
    }


def create_state(optimizer: torch.optim.Optimizer, fragment: Fragment, keys: list[str], numbers: dict[str, float]):
    """Give the owner an optimizer state with these tensors (zeros where new) and these numbers."""
    owner, swap = fragment.owner, fragment.swap
    is_torch = type(optimizer).__module__.startswith("torch.")
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    device = owner.device if fused else torch.device("cpu")
    entries: dict[str, Any] = dict(optimizer.state.get(owner, {}))
    for key in keys:
        if key in entries:
            continue
        if swap is None:
            entries[key] = torch.zeros_like(owner.detach())
        else:  # DeepSpeed swaps moments, not the average
            entries[key] = average_on_disk(swap) if key == EMA else add_tensor(swap, owner, key)
    for key, value in numbers.items():
        entries[key] = torch.tensor(value, dtype=torch.float32, device=device) if is_torch else int(value)
    optimizer.state[owner] = entries


def average_on_disk(swap: Any) -> torch.Tensor:
    """Return zeros [numel] for the moving average of weights on a disk, in a file next to them."""
    return zeros_in_file(swap.numel(), swap.dtype(), Path(swap.swap_folder))


def buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the persistent buffers, which belong to the model's weights."""
    for prefix, sub in module.named_modules(remove_duplicate=True):
        for name, value in sub.named_buffers(prefix, recurse=False):
            if name.rsplit(".", 1)[-1] not in sub._non_persistent_buffers_set:
                yield name, value
