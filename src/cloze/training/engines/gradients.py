"""The norm of the whole gradient, as exact in every engine as DeepSpeed's, which adds squares in fp64.

torch's own norm of a tensor on a CPU (2.13) adds squares sequentially in fp32: 2.5e-4 too low for 38 million elements.
Clipping by it would make a run depend on its engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from cloze.training.engines.sharded_state import local

_ROW = 1024  # elements; 4,096 take half the time, but are 4e-7 too low for rounded positive numbers


@torch.no_grad()
def gradient_norm(parameters: Sequence[torch.nn.Parameter], divided: bool) -> torch.Tensor:
    """Return the 2-norm of all gradients: an fp32 scalar on their device, the same on every rank.

    `divided`: each rank holds a part of each gradient (FSDP2); every rank calls it.
    """
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    square = sum_of_squares(gradients)
    if divided:
        torch.distributed.all_reduce(square)
    return square.sqrt().float()


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of all squared elements, an fp64 scalar on the device of the first tensor.

    Norms are computed in fp32, on a CPU of rows of 1,024 elements, on a GPU of whole tensors, which are reduced as a
    tree; their squares are added in fp64. Relative error of the norm: 1e-7 on a CPU, 1e-6 on a GPU.
    """
    device = tensors[0].device
    held = [tensor if tensor.itemsize > 2 else tensor.float() for tensor in tensors if tensor.numel()]
    if not held:
        return torch.zeros((), dtype=torch.float64, device=device)
    if device.type == "cpu":
        norms = torch.cat([_row_norms(tensor.reshape(-1)) for tensor in held])
    else:
        norms = torch.stack(torch._foreach_norm(held))
    return norms.double().square().sum()


def _row_norms(flat: torch.Tensor) -> torch.Tensor:
    """Return the norms of rows of 1,024 elements of a tensor [n], the last one shorter: [n // 1024 + 1]."""
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1)
    return torch.cat([rows, torch.linalg.vector_norm(flat[whole:]).view(1)])


def use_exact_norms() -> None:
    """Make DeepSpeed (0.19.8) add squares in fp64 in its optimizers that hold whole half-precision weights (ZeRO-0,
    and ZeRO-1 in bf16), which add them in fp32."""
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.fp16 import fused_optimizer, unfused_optimizer

    def norm_of_tensors(input_tensors: Iterable[torch.Tensor], *_: object, **__: object) -> torch.Tensor:
        norm = sum_of_squares(list(input_tensors)).sqrt().float()
        return torch.where(torch.isfinite(norm), norm, -1.0)  # marks a norm that is not finite

    def weight_norm(parameters: torch.Tensor | Iterable[torch.Tensor], *_: object, **__: object) -> float:
        return norm_of_tensors([parameters] if isinstance(parameters, torch.Tensor) else parameters).item()

    bf16_optimizer.get_global_norm_of_tensors = norm_of_tensors
    fused_optimizer.get_weight_norm = unfused_optimizer.get_weight_norm = weight_norm
