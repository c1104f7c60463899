"""Comparisons with a tolerance that a NaN cannot pass, as it does `if difference > allowed: raise` and `max(0, nan)`.

Every comparison of numbers with a tolerance goes through here; tests/unit/utils/test_closeness.py looks for others.

    within(difference, 1e-4)                    # False for NaN
    relative_difference(logits, stored)         # infinity if either is not finite
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


def within(difference: float, allowed: float) -> bool:
    """Return whether a difference is at most `allowed`; False if either is NaN."""
    return difference <= allowed


def largest(values: Iterable[float]) -> float:
    """Return the largest of some numbers, 0 of none; NaN if one of them is NaN."""
    found = 0.0
    for value in values:
        if math.isnan(value):
            return value
        found = max(found, value)
    return found


@torch.no_grad()
def relative_difference(here: torch.Tensor, there: torch.Tensor) -> float:
    """Return the largest difference between two tensors relative to the largest |there|; 0 if both are empty.

    Infinity for other shapes, or if either holds a value that is not finite.
    """
    if here.shape != there.shape or not (torch.isfinite(here).all() and torch.isfinite(there).all()):
        return math.inf
    if there.numel() == 0:
        return 0.0
    difference, scale = float((here - there).abs().max()), float(there.abs().max())
    return difference / scale if scale else (math.inf if difference else 0.0)
