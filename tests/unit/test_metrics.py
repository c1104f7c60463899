"""What a line of metrics says: losses of the steps that counted, real and masked tokens, operations, utilization."""

from __future__ import annotations

import time

import pytest
import torch

from cloze.data.loader import Layout
from cloze.train import metrics
from cloze.train.metrics import Pace, Window
from cloze.train.plan import Plan

CPU = torch.device("cpu")
PLAN = Plan(Layout(4, 1, 0, 2), num_blocks=1000, block_size=32, total_samples=10**6, total_steps=10**5)


def add(window: Window, loss: float, refused: bool, num_masked: int) -> None:
    window.add(torch.tensor(loss, dtype=torch.float64), torch.tensor(refused), torch.tensor(num_masked))


def test_a_refused_step_has_tokens_but_no_loss():
    window = Window(0, CPU)
    add(window, 3.0, False, 40)
    add(window, float("nan"), True, 38)
    add(window, 5.0, False, 42)
    assert window.sums.tolist() == [8.0, 2.0, 120.0]


def test_a_step_without_masked_tokens_has_no_loss():
    window = Window(0, CPU)
    add(window, 0.0, False, 0)
    assert window.sums.tolist() == [0.0, 0.0, 0.0]
    add(window, 3.0, False, 40)
    assert window.close(2, window.sums.tolist(), PLAN, Pace(None, None))["loss"] == 3.0


def test_speed_is_of_real_tokens_and_the_next_window_begins_anew(monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 110.0, 110.0, 112.0, 112.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    window = Window(10, CPU)
    line = window.close(
        20, [30.0, 10.0, 400.0], PLAN, Pace(token_flops=2e12 * 10 / 2560, peak_flops=1e13, filled=0.75)
    )
    assert line["loss"] == 3.0
    assert line["tokens_per_second"] == 10 * 8 * 32 * 0.75 / 10  # steps * blocks * tokens * filled / seconds
    assert line["masked_tokens_per_second"] == 40.0
    assert (line["tflops"], line["mfu"]) == (2.0, 0.2)
    assert line["memory_gib"] > 0
    after = window.close(21, [0.0, 0.0, 0.0], PLAN, Pace(None, None))
    assert (after["loss"], after["tflops"], after["mfu"]) == (None, None, None)
    assert after["tokens_per_second"] == 8 * 32 / 2


def test_waiting_for_data_counts_as_such():
    class Slow:
        def __iter__(self):
            time.sleep(0.05)
            yield "batch"

    window = Window(0, CPU)
    assert list(window.timed(Slow())) == ["batch"]
    assert 0.5 < window.close(1, [1.0, 1.0, 1.0], PLAN, Pace(None, None))["data_wait"] <= 1.0
