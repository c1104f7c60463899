"""Checksums of tensors: the same however they are cut, another for any change of any element."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloze.checkpoint.checksum import add_sums, content_sum

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.int8]
SIZE = 200_000  # more than three chunks


def tensor(dtype: torch.dtype, size: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 100, (size,), generator=generator)
    return (values - 50).to(dtype) if dtype.is_signed else values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_add_up_to_the_whole(dtype: torch.dtype):
    whole = tensor(dtype)

    @settings(max_examples=30, deadline=None, database=None)
    @given(st.lists(st.integers(0, SIZE), max_size=6))
    def check(cuts: list[int]) -> None:
        edges = [0, *sorted(cuts), SIZE]
        parts = [content_sum(whole[a:b], a) for a, b in pairwise(edges)]
        assert add_sums(parts) == content_sum(whole, 0)

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bit_or_another_place_changes_it(dtype: torch.dtype):
    whole = tensor(dtype)
    plain = content_sum(whole, 0)
    assert -(2**63) <= plain < 2**63
    generator = torch.Generator().manual_seed(2)
    for place in [0, SIZE - 1, 65535, 65536, *torch.randint(0, SIZE, (100,), generator=generator).tolist()]:
        bytes_of = whole.clone().view(torch.uint8)
        at = place * whole.element_size() + int(torch.randint(0, whole.element_size(), (1,), generator=generator))
        bytes_of[at] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
        assert content_sum(bytes_of.view(dtype), 0) != plain
    for one, other in torch.randint(0, SIZE, (100, 2), generator=generator).tolist():
        swapped = whole.clone()
        swapped[one], swapped[other] = whole[other], whole[one]
        assert (content_sum(swapped, 0) == plain) == (whole[one] == whole[other])
    assert content_sum(whole, 1) != plain


def test_it_is_the_formula():
    """Worked out with Python's integers."""
    values = [3, -7, 11]
    offset = 65534
    total = 0
    for number, value in enumerate(values):
        chunk, near = divmod(offset + number, 65536)
        weight = ((near * 0x9E3779B97F4A7C15) % 2**64 | 1) * ((chunk * 0xD1B54A32D192ED03) % 2**64 | 1)
        total += value * weight
    assert content_sum(torch.tensor(values, dtype=torch.int32), offset) == (total + 2**63) % 2**64 - 2**63
    assert content_sum(torch.empty(0), 5) == 0


def test_checksums_stay_those_of_stored_checkpoints():
    """The formula of the module, with its constants written out, in integers without a limit."""
    near, far, count, offset = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 3000, 2 * 65536 - 1000
    values = torch.arange(count, dtype=torch.int32) * 7919 - 10_000_000
    total = 0
    for place, value in enumerate(values.tolist(), start=offset):
        chunk, within = divmod(place, 65536)
        total += value * ((within * near) | 1) * ((chunk * far) | 1)
    assert content_sum(values.view(torch.float32), offset) % 2**64 == total % 2**64
