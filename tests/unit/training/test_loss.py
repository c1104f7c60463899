"""The loss is a sum in fp32, whatever the logits are in."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloze.data.batches.masking import IGNORE_INDEX
from cloze.training.loss import masked_loss_sum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_half_precision_logits_is_that_of_the_same_logits_in_fp64(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(64, 1000, generator=generator) * 4).to(dtype)
    targets = torch.randint(1000, (64,), generator=generator)
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    loss = masked_loss_sum(logits, targets)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=1e-6)
    rounded = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert float(rounded) != pytest.approx(float(exact), rel=1e-6)  # else the promise needs no fp32


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 9), max_size=3), st.integers(2, 6))
@example(count=1, cuts=[], vocabulary=2)  # one masked token
@example(count=2, cuts=[1], vocabulary=2)
@example(count=3, cuts=[0, 0, 3], vocabulary=2)  # parts without tokens
def test_the_loss_of_a_batch_is_the_sum_over_its_parts_however_it_is_cut(count: int, cuts: list[int], vocabulary: int):
    generator = torch.Generator().manual_seed(count)
    scores = torch.randn(count, vocabulary, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (count,), generator=generator)
    edges = sorted([0, count, *(cut for cut in cuts if cut < count)])
    parts = [masked_loss_sum(scores[a:b], targets[a:b]) for a, b in pairwise(edges)]
    sum(parts).backward()
    exact = scores.detach().double()
    losses = exact.logsumexp(1) - exact[range(count), targets]
    assert sum(parts).item() == pytest.approx(losses.sum().item(), rel=1e-6)
    gradient = exact.softmax(1) - torch.nn.functional.one_hot(targets, vocabulary)
    torch.testing.assert_close(scores.grad.double(), gradient, rtol=1e-5, atol=1e-7)


def test_positions_that_predict_nothing_add_nothing():
    logits = torch.randn(4, 10, requires_grad=True)
    targets = torch.tensor([3, IGNORE_INDEX, 5, IGNORE_INDEX])
    loss = masked_loss_sum(logits, targets)
    assert torch.equal(loss, masked_loss_sum(logits[[0, 2]], targets[[0, 2]]))
    nothing = masked_loss_sum(logits, torch.full((4,), IGNORE_INDEX))
    nothing.backward()
    assert nothing.item() == 0
    assert torch.equal(logits.grad, torch.zeros(4, 10))
