"""Model how the planned device computes, as far as that decides what is kept in memory.

    with AsDevice(on_gpu=True, cast=torch.bfloat16): ...      # calls on meta tensors keep what they would keep there

Fused attention keeps its inputs, its output and one number a row (FlashAttention, Dao et al. 2022, and the efficient
kernel); on a CPU only without dropout. Dropout keeps one byte an element on a GPU. Autocast, which does not
know the meta device, follows PyTorch's lists ("CUDA Ops that can autocast to float16" and "to float32"; on a CPU those
of layers stay as they are), with a copy of each weight until the forward pass ends.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_HALF = {
    "linear",
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "conv1d",
    "conv2d",
    "einsum",
}
_FLOAT = {"layer_norm", "softmax", "log_softmax", "cross_entropy", "norm", "pow", "exp", "cumsum", "rsqrt"}
_ATTENTION = "scaled_dot_product_attention"


class AsDevice(TorchFunctionMode):
    """Inside, attention, dropout and autocast are as the device to plan for has them, for tensors on the meta device.
    `cast`: the type that autocast uses, None without it."""

    def __init__(self, on_gpu: bool, cast: torch.dtype | None):
        super().__init__()
        self._on_gpu, self._cast = on_gpu, cast
        self._copies: dict[int, torch.Tensor] | None = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if self._cast is not None and (name in _HALF or name == _ATTENTION):
            args, kwargs = self._all(args, self._half), self._all(kwargs, self._half)
        elif self._cast is not None and self._on_gpu and name in _FLOAT:
            args, kwargs = self._all(args, _float), self._all(kwargs, _float)
        if name == _ATTENTION and (self._on_gpu or not _value(args, kwargs, 4, "dropout_p", 0.0)):
            return _Attention.apply(
                *(_value(args, kwargs, i, n, None) for i, n in enumerate(("query", "key", "value")))
            )
        if func is F.dropout and self._on_gpu:
            share = _value(args, kwargs, 1, "p", 0.5)
            if not _value(args, kwargs, 2, "training", True) or share == 0:
                return args[0] if args else kwargs["input"]
            return torch.native_dropout(args[0] if args else kwargs["input"], share, True)[0]
        return func(*args, **kwargs)

    def _all(self, values: Any, change: Any) -> Any:
        return torch.utils._pytree.tree_map(lambda v: change(v) if isinstance(v, torch.Tensor) else v, values)

    def _half(self, value: torch.Tensor) -> torch.Tensor:
        """Cast as autocast does, which keeps copies of weights until the forward pass ends."""
        if value.dtype is not torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self._cast)
        if self._copies is None:
            return value.to(self._cast)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(self._cast)
        return self._copies[id(value)]

    def forget(self) -> None:
        """End the forward pass: drop the copies of weights, except those that the backward pass needs, and keep
        none when activations are computed anew."""
        self._copies = None


def _float(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _value(args: Any, kwargs: Any, place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


class _Attention(torch.autograd.Function):
    """What fused attention keeps: query, key, value, output [B, H, S, D], and [B, H, S] sums in fp32."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
