"""What a step sends, by the formula; tests/cluster/test_bytes_sent.py counts it."""

from __future__ import annotations

import pytest

from cloze.tools.planning.communication import bytes_per_step, fsdp_bytes_per_step


@pytest.mark.parametrize(("stage", "units"), [(0, 2), (1, 3), (2, 3), (3, 3)])
def test_many_ranks_send_two_or_three_times_the_model(stage: int, units: int):
    assert bytes_per_step(10**6, 2, 10**9, stage) == pytest.approx(units * 2e6)


@pytest.mark.parametrize(("stage", "units"), [(0, 2), (1, 3), (2, 9), (3, 12)])
def test_micro_batches_cost_where_gradients_or_weights_are_divided(stage: int, units: int):
    assert bytes_per_step(10**6, 4, 2, stage, micro_batches=4) == units * 2e6


def test_one_rank_sends_nothing():
    assert bytes_per_step(10**6, 4, 1, 3) == 0


def test_fsdp_in_fp32_with_all_in_layers_sends_what_zero3_sends():
    assert fsdp_bytes_per_step(10**6, 10**6, 4, 8) == bytes_per_step(10**6, 4, 8, 3)


def test_fsdp_gathers_in_every_micro_batch_and_reduces_in_the_last():
    assert fsdp_bytes_per_step(10**6, 400_000, 2, 2, micro_batches=3) == (3 * 1_400_000 * 2 + 4e6) / 2
