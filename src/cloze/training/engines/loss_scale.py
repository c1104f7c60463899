"""Corrections to how DeepSpeed (0.19.8) uses fp16's loss scale.

DeepSpeed raises the scale before it divides the gradients by it: a step at which the scale grows would use only half
of each gradient. ZeRO-0 divides the gradients by the scale but does not multiply the loss by it, and returns the norm
of the gradients before the division.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def start_with_scale(loss: torch.Tensor, zero: Any) -> None:
    """Make the backward pass of `loss` start with the loss scale of a DeepSpeed optimizer, with no effect if DeepSpeed
    multiplies the loss by it itself."""
    loss.register_hook(lambda gradient: torch.full_like(gradient, zero.loss_scale))


@contextmanager
def norm_scale_of_step(zero: Any) -> Iterator[float]:
    """Postpone a rise of the loss scale to the end of the DeepSpeed step inside the block; a skipped step still lowers
    it at once. Yield the divisor for the norm that DeepSpeed returns."""
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
