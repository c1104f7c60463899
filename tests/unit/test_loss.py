"""The loss is a sum in fp32, whatever the logits are in."""

from __future__ import annotations

import pytest
import torch

from cloze.data.masking import IGNORE_INDEX
from cloze.train.loss import masked_loss_sum


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


def test_positions_that_predict_nothing_add_nothing():
    logits = torch.randn(4, 10, requires_grad=True)
    targets = torch.tensor([3, IGNORE_INDEX, 5, IGNORE_INDEX])
    loss = masked_loss_sum(logits, targets)
    assert torch.equal(loss, masked_loss_sum(logits[[0, 2]], targets[[0, 2]]))
    nothing = masked_loss_sum(logits, torch.full((4,), IGNORE_INDEX))
    nothing.backward()
    assert nothing.item() == 0
    assert torch.equal(logits.grad, torch.zeros(4, 10))
