"""Corrections to how DeepSpeed (0.19.8) uses fp16's loss scale.

DeepSpeed raises the scale before it divides the gradients by it: a step at which the scale grows would be taken with
half of the gradient. ZeRO-0 divides the gradients by the scale but does not multiply the loss by it, and returns the
norm of the gradients before the division.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def start_with_scale(loss: torch.Tensor, zero: Any) -> None:
    """Let the backward pass of `loss` start with the loss scale of a DeepSpeed optimizer, as it does already if
    DeepSpeed multiplies the loss by it."""
    loss.register_hook(lambda gradient: torch.full_like(gradient, zero.loss_scale))


@contextmanager
def norm_scale_of_step(zero: Any) -> Iterator[float]:
    """Let a DeepSpeed optimizer that takes a step within raise the loss scale at the end of it; a skipped step lowers
    it as before. Yield what the norm is to be divided by that DeepSpeed returns."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    update, taken = zero._update_scale, []

    def postpone(overflow: bool) -> None:
        if overflow:
            update(overflow)
        else:
            taken.append(True)

    zero._update_scale = postpone
    try:
        yield float(zero.loss_scale) if isinstance(zero, FP16_UnfusedOptimizer) else 1.0
    finally:
        del zero._update_scale
    if taken:
        update(False)
