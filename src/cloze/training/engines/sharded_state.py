"""The training state per parameter, whatever engine holds it.

Every engine keeps, somewhere, the fp32 weight of each trainable parameter and its optimizer state: DDP in the
parameter itself, FSDP2 in rows of it, ZeRO-1/2 in one flat tensor per parameter group of which each rank has a piece,
ZeRO-3 in flat tensors of padded pieces. `fragments` says, for this rank, which part of which parameter lies where:

    parameter `name`, elements [offset, offset + length)   <->   owner.view(-1)[start : start + length]

with `owner` the tensor under which the inner optimizer keeps its state (of which FSDP2 has rows on each rank). Reading
and writing checkpoints needs no more than that, so any engine at any world size reads what any other wrote. What
DeepSpeed has put on a disk (NVMe offload) is mapped from there, between steps: see
`cloze.training.engines.nvme_offload`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from cloze.checkpoint.format import EMA, NUMBERS, WEIGHT
from cloze.model.mapped import zeros_in_file
from cloze.training.engines.nvme_offload import add_tensor, forget_state, on_disk, swapped_part, swapped_state


@dataclass(frozen=True)
class Fragment:
    """A run of elements of one parameter that this rank holds. `swap`: DeepSpeed's record of where the owner is, where
    it is on a disk."""

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    owner: torch.Tensor
    start: int
    swap: Any = None

    def view(self, key: str, state: dict[torch.Tensor, dict[str, Any]]) -> torch.Tensor:
        """The elements themselves, [length], for the weight or for one of the optimizer's tensors."""
        whole = self.owner if key == WEIGHT else state[self.owner][key]
        whole = local(whole) if self.swap is None else on_disk(self.swap, whole).detach()
        return whole.view(-1).narrow(0, self.start, self.length)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def zero_optimizer(optimizer: Any) -> Any:
    """DeepSpeed's own optimizer inside accelerate's wrapper; the same object without DeepSpeed."""
    return optimizer.optimizer if type(optimizer).__module__.startswith("accelerate.") else optimizer


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies on this rank, sharing its memory: rows of it under FSDP2, all of it else."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()  # type: ignore[attr-defined]


def own_rows(parameter: DTensor) -> tuple[int, int]:
    """(offset, length) of this rank's elements of a parameter under FSDP2, which gives ranks the rows that
    `torch.chunk` gives: the last ranks may have fewer, or none."""
    rows, mesh = parameter.shape[0], parameter.device_mesh
    first = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    return first * (parameter.numel() // max(rows, 1)), local(parameter).numel()


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The parameter's shape, also where ZeRO-3 has taken its elements away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def fragments(module: torch.nn.Module, optimizer: Any, rank: int) -> list[Fragment]:
    """This rank's fragments of all trainable parameters of the unwrapped `module`."""
    zero = zero_optimizer(optimizer)
    found = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = shape_of(parameter)
        where = _locate(parameter, zero, rank)
        if where is not None and where[1] > 0:  # nothing is stored of a parameter without elements
            found.append(Fragment(name, shape, *where, swapped_state(zero, where[2])))
    return found


def _locate(parameter: Any, zero: Any, rank: int) -> tuple[int, int, torch.Tensor, int] | None:
    """Return (offset in the parameter, length, owner, start in the owner) of what this rank holds; None, or a length
    below 1, if it holds nothing."""
    if isinstance(parameter, DTensor):
        offset, length = own_rows(parameter)
        return offset, length, parameter, 0
    if hasattr(parameter, "ds_id"):  # ZeRO-3: every parameter is cut into equal pieces, the last ones padded
        group, start, piece = zero.grad_position[zero.get_param_id(parameter)]
        offset = rank * parameter.ds_tensor.ds_numel
        length = min(piece, parameter.ds_numel - offset)
        return offset, length, zero.fp32_partitioned_groups_flat[group], start
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1/2, and ZeRO-1 in bf16 (DeepSpeed's BF16_Optimizer)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        groups = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
        owner = groups[mapping.param_group_index]
        lp, hp = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        return lp.start, lp.numel, owner, hp.start
    if hasattr(zero, "fp16_groups") and hasattr(zero, "fp32_groups"):  # ZeRO-0 in bf16 or fp16: fp32 copies, whole
        for half, full in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
            for low, high in zip(half, full, strict=True):
                if low is parameter:
                    return 0, high.numel(), high, 0
    return 0, parameter.numel(), parameter, 0


def is_partitioned(module: torch.nn.Module) -> bool:
    """Whether each rank holds only a part of the training state (ZeRO-1 and up, FSDP2)."""
    return any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") or isinstance(p, DTensor) for p in module.parameters())


@contextlib.contextmanager
def at_rest(optimizer: Any) -> Iterator[None]:
    """Release the parameters that ZeRO-3 has prefetched before the block runs: a forward pass without a backward pass
    leaves some, and DeepSpeed refuses to gather those. Every rank calls it."""
    zero = zero_optimizer(optimizer)
    if not hasattr(zero, "checkpoint_event_prologue"):  # DeepSpeed calls it before its own checkpoints
        yield
        return
    zero.checkpoint_event_prologue()
    yield
    zero.checkpoint_event_epilogue()


def whole(parameter: Any) -> torch.Tensor:
    """Return the full value of a parameter that the model computes with. Under ZeRO-3 and FSDP2 every rank must call
    it, under ZeRO-3 inside `at_rest`."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor()  # type: ignore[attr-defined]
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def tensor_keys(fragment: Fragment, state: dict[torch.Tensor, dict[str, Any]]) -> list[str]:
    """Names of the optimizer's tensors that have one element per element of the owner (exp_avg, ...)."""
    sizes = {fragment.owner.shape}
    if fragment.swap is not None:  # on the disk, what stands for a tensor in memory is empty
        sizes.add(torch.Size([fragment.swap.numel()]))
    entries = state.get(fragment.owner, {}).items()
    return sorted(
        key for key, value in entries if torch.is_tensor(value) and value.shape in sizes and key not in NUMBERS
    )


def scalars(owner: torch.Tensor, state: dict[torch.Tensor, dict[str, Any]]) -> dict[str, float]:
    """Return the optimizer's single numbers for `owner` (`step`)."""
    entries = state.get(owner, {}).items()
    return {
        key: float(value)
        for key, value in sorted(entries)
        if isinstance(value, int | float)
        or (torch.is_tensor(value) and value.numel() == 1 and (key in NUMBERS or value.shape != owner.shape))
    }


def forget(optimizer: Any) -> None:
    """Forget the optimizer's state: the start of a run, or of loading one."""
    inner_optimizer(optimizer).state.clear()
    forget_state(zero_optimizer(optimizer))


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
    """Zeros [numel] for the moving average of weights that are on a disk, beside them."""
    return zeros_in_file(swap.numel(), swap.dtype(), Path(swap.swap_folder))


def set_weights(module: torch.nn.Module, optimizer: Any, rank: int, weights: dict[str, torch.Tensor]) -> None:
    """Put whole fp32 weights, by name, into the engine, and forget the optimizer's state: the start of a run."""
    forget(optimizer)
    state = inner_optimizer(optimizer).state
    for fragment in fragments(module, optimizer, rank):
        values = weights[fragment.name].reshape(-1)[fragment.offset : fragment.offset + fragment.length]
        fragment.view(WEIGHT, state).copy_(values)
    for name, parameter in module.named_parameters():
        refresh_model(parameter, weights[name], rank)


def refresh_model(parameter: Any, full: torch.Tensor, rank: int) -> None:
    """Set the copy that the model computes with. full: the whole fp32 weight, any device."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            offset, length = own_rows(parameter)
            local(parameter).view(-1).copy_(full.reshape(-1)[offset : offset + length])
        elif hasattr(parameter, "ds_id"):
            part = swapped_part(parameter)
            offset = min(rank * part.numel(), full.numel())
            own = full.reshape(-1)[offset : offset + part.numel()]
            part.zero_()
            part[: own.numel()].copy_(own)
            parameter.ds_secondary_tensor = None  # ZeRO++'s second partition is made of the new weights
            if parameter.data.numel() == parameter.ds_numel:  # small parameters are kept whole beside their piece
                parameter.data.copy_(full.view(parameter.data.shape))
        else:
            parameter.data.copy_(full.view(parameter.data.shape))


def buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that belong to the model's weights (persistent ones)."""
    for prefix, sub in module.named_modules(remove_duplicate=True):
        for name, value in sub.named_buffers(prefix, recurse=False):
            if name.rsplit(".", 1)[-1] not in sub._non_persistent_buffers_set:
                yield name, value
