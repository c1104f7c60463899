"""Checksums of tensors that do not depend on how the tensors are cut into pieces.

The sum over elements i of bits(i) * weight(i) modulo 2^64, the weights being odd functions of the element's number in
the whole parameter: the sums of pieces add up to the sum of the whole, a changed element always changes it, and an
element in a wrong place does too. So what one engine wrote in two pieces and another holds in three can be compared.

    content_sum(piece, offset) + content_sum(rest, offset + len(piece)) == content_sum(whole, 0)   (modulo 2^64)

Element i = c * 2^16 + j weighs near[j] * far(c), so that one table serves all; elements of 8 bytes count as two of 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
import torch

_CHUNK = 1 << 16  # elements; with its products, a chunk stays in a core's cache
_NEAR, _FAR = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03  # odd, bits without a pattern (Steele et al., OOPSLA 2014)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@torch.no_grad()
def content_sum(flat: torch.Tensor, offset: int) -> int:
    """Sum of a run of elements, [n] of any type on any device, that begins at element `offset`: a signed int64."""
    bits = flat.detach().view(_BITS[flat.element_size()])
    offset *= 2 if flat.element_size() == 8 else 1
    dot = _dot_on_cpu(bits) if bits.device.type == "cpu" else _dot_on_device(bits)
    total, begin = 0, 0
    while begin < bits.numel():
        chunk, first = divmod(offset + begin, _CHUNK)
        end = min(bits.numel(), begin + _CHUNK - first)
        total += dot(begin, end, first) * ((chunk * _FAR) % (1 << 64) | 1)
        begin = end
    return _signed(total)


def _dot_on_cpu(bits: torch.Tensor) -> Callable[[int, int, int], int]:
    """Return (begin, end, first) -> sum of bits[begin:end] * near[first:...] modulo 2^64."""
    values, near, products = bits.numpy(), _near().numpy(), np.empty(_CHUNK, np.int64)

    def dot(begin: int, end: int, first: int) -> int:
        count = end - begin
        np.multiply(values[begin:end], near[first : first + count], out=products[:count])
        return int(products[:count].sum())

    return dot


def _dot_on_device(bits: torch.Tensor) -> Callable[[int, int, int], int]:
    near = _near().to(bits.device)
    return lambda begin, end, first: int((bits[begin:end] * near[first : first + end - begin]).sum())


@cache
def _near() -> torch.Tensor:
    """Return [_CHUNK] odd int64."""
    return torch.arange(_CHUNK).mul_(_signed(_NEAR)).bitwise_or_(1)


def add_sums(sums: Iterable[int]) -> int:
    """Return the sum of several, as a signed int64."""
    return _signed(sum(sums))


def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
