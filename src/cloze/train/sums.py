"""Checksums of tensors that do not depend on how the tensors are cut into pieces.

The sum over elements i of bits(i) * weight(i) modulo 2^64, the weights being odd functions of the element's number in
the whole parameter: the sums of pieces add up to the sum of the whole, a changed element always changes it, and an
element in a wrong place does too. So what one engine wrote in two pieces and another holds in three can be compared.

    content_sum(piece, offset) + content_sum(rest, offset + len(piece)) == content_sum(whole, 0)   (modulo 2^64)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_CHUNK = 1 << 20
_FACTOR = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, odd
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def content_sum(flat: torch.Tensor, offset: int) -> int:
    """Sum of a run of elements, [n] of any type on any device, that begins at element `offset`: a signed int64."""
    bits = flat.detach().view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for begin in range(0, bits.numel(), _CHUNK):
        part = bits[begin : begin + _CHUNK].to(torch.int64)
        weights = torch.arange(offset + begin, offset + begin + part.numel(), device=flat.device)
        total += (part * weights.mul_(_FACTOR).bitwise_or_(1)).sum()
    return int(total)


def add_sums(sums: Iterable[int]) -> int:
    """The sum of several, as a signed int64."""
    return (sum(sums) + (1 << 63)) % (1 << 64) - (1 << 63)
