"""Compute in fp32 with a model whose weights are in half precision, without a second copy of them.

with torch.no_grad(), InFloat32():
    logits = model(input_ids=ids).logits
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class InFloat32(TorchFunctionMode):
    """Computes in fp32 with half-precision weights, converted one at a time when they are used: a CPU lacks some
    operations in half precision, and a copy of all weights would take too much memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute; a half precision tensor passes for what it is computed as
            value = func(*args, **(kwargs or {}))
            return torch.float32 if value in (torch.bfloat16, torch.float16) else value
        return func(*tree_map(_longer, args), **tree_map(_longer, kwargs or {}))


def _longer(value: Any) -> Any:
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value
