"""Learning rates at points worked out by hand, those of transformers at every step, and without state."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference.training import Options, factor, steps_of
from transformers import get_scheduler

from cloze.config import TrainConfig
from cloze.config.parser import parse
from cloze.errors import ConfigError
from cloze.training.optim.lr_schedule import learning_rate_schedule


def config(**values) -> TrainConfig:
    return TrainConfig(dataset_name="", output_dir="", **values)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("linear", None),
        ("cosine", None),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("polynomial", {"power": 2.0}),
        ("constant", None),
        ("constant_with_warmup", None),
        ("inverse_sqrt", None),
        ("warmup_stable_decay", {"num_decay_steps": 10}),
    ],
)
def test_every_schedule_is_that_of_transformers(name: str, kwargs: dict | None):
    schedule = learning_rate_schedule(
        config(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=5, learning_rate=3e-4), total_steps=40
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(name, optimizer, 5, 40, scheduler_specific_kwargs=kwargs)
    expected = []
    for _ in range(40):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert [schedule(step) for step in range(40)] == expected
    assert [schedule(step) for step in (30, 3, 17)] == [expected[30], expected[3], expected[17]]


# 100 steps, 10 of warm-up: the first, half of the warm-up, its end, the plateau (or a way down), and later ones.
BY_HAND = [
    ("linear", None, {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 99: 1 / 90}),
    ("cosine", None, {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 99: 0.5 * (1 + math.cos(math.pi * 89 / 90))}),
    ("inverse_sqrt", None, {0: 0.0, 5: 0.5, 10: 1.0, 40: 0.5, 90: 1 / 3}),
    ("warmup_stable_decay", None, {0: 0.0, 5: 0.5, 10: 1.0, 50: 1.0, 90: 1.0, 95: 0.5, 99: 0.02447174}),  # cosine
    ("wsd", {"decay_type": "linear"}, {0: 0.0, 5: 0.5, 10: 1.0, 50: 1.0, 90: 1.0, 95: 0.5, 99: 0.1}),
    ("wsd", {"decay_type": "linear", "num_decay_steps": 0.4}, {10: 1.0, 60: 1.0, 80: 0.5, 99: 1 / 40}),
    ("trapezoid", {"decay_type": "1-sqrt", "num_decay_steps": 40}, {10: 1.0, 60: 1.0, 70: 0.5, 80: 0.2928932}),
    ("wsd", {"decay_type": "1_sqrt", "num_stable_steps": 50}, {10: 1.0, 60: 1.0, 70: 0.5, 99: 1 - math.sqrt(39 / 40)}),
    ("wsd", {"decay_type": "linear", "min_lr_ratio": 0.2}, {0: 0.2, 5: 0.6, 10: 1.0, 90: 1.0, 95: 0.6, 99: 0.28}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "points"), BY_HAND, ids=str)
def test_curves_go_through_points_worked_out_by_hand(name: str, kwargs: dict | None, points: dict[int, float]):
    values = {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs, "warmup_steps": 0.1, "learning_rate": 3e-4}
    schedule = learning_rate_schedule(config(**values), total_steps=100)
    assert {step: schedule(step) for step in points} == pytest.approx({k: 3e-4 * v for k, v in points.items()})


def test_warmup_below_one_is_a_share_of_the_steps():
    by_share = learning_rate_schedule(config(warmup_steps=0.1), 50)
    by_steps = learning_rate_schedule(config(warmup_steps=5), 50)
    assert [by_share(s) for s in range(50)] == [by_steps(s) for s in range(50)]
    assert by_share(4) < by_share(5) > by_share(6)


def test_the_configuration_that_was_given_is_left_as_it_was():
    given = {"num_decay_steps": 0.5, "num_stable_steps": 5, "decay_type": "sqrt"}
    learning_rate_schedule(config(lr_scheduler_type="wsd", lr_scheduler_kwargs=given), 10)
    assert given == {"num_decay_steps": 0.5, "num_stable_steps": 5, "decay_type": "sqrt"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"lr_scheduler_type": "1-sqrt"},
            "1-sqrt is a way to decay, not a schedule; "
            """use warmup_stable_decay with --lr_scheduler_kwargs '{"decay_type": "1-sqrt"}'""",
        ),
        (
            {"lr_scheduler_type": "wsd", "warmup_steps": 30, "lr_scheduler_kwargs": {"num_decay_steps": 0.75}},
            "30 steps of warm-up + 75 of decay do not fit into a run of 100; give num_decay_steps only",
        ),
        (
            {"lr_scheduler_type": "wsd", "lr_scheduler_kwargs": {"num_decay_steps": 20, "num_stable_steps": 50}},
            "0 steps of warm-up + 50 of plateau + 20 of decay do not fit into a run of 100",
        ),
        (
            {"lr_scheduler_type": "wsd", "lr_scheduler_kwargs": {"num_decay_steps": "all"}},
            "num_decay_steps must be a number of steps or a share of them, not 'all'",
        ),
        (
            {"lr_scheduler_type": "wsd", "lr_scheduler_kwargs": {"num_decay_steps": True}},
            "num_decay_steps must be a number of steps or a share of them, not True",
        ),
        (
            {"lr_scheduler_type": "wsd", "lr_scheduler_kwargs": {"num_decay_steps": -1}},
            "num_decay_steps must be a number of steps or a share of them, not -1",
        ),
        ({"lr_scheduler_type": "wsd", "lr_scheduler_kwargs": {"decay_type": "slow"}}, "Unknown decay type: slow"),
        ({"lr_scheduler_type": "zigzag"}, "no schedule 'zigzag'; there are: "),
        ({"lr_scheduler_type": "cosin"}, "--lr_scheduler_type: no schedule 'cosin'; did you mean cosine?"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 2}},
            "--lr_scheduler_kwargs: cosine has no argument 'num_cycle'; it has num_cycles",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": float("nan")}},
            "num_cycles must be a finite number, not nan",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "high"}},
            "power must be a finite number, not 'high'",
        ),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1e9}}, "--lr_scheduler_kwargs: "),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": -5}}, "--lr_scheduler_kwargs: "),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "depends on more than the step"),
    ],
)
def test_what_cannot_be_a_schedule_is_one_line(values: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        learning_rate_schedule(config(**values), 100)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arguments_of_a_schedule_come_through_the_command_line():
    kwargs = '{"num_decay_steps": 0.2, "decay_type": "1-sqrt"}'
    _, parsed = parse(["train", "--output_dir", "x", "--lr_scheduler_type", "wsd", "--lr_scheduler_kwargs", kwargs])
    assert learning_rate_schedule(parsed, 100)(85) == pytest.approx(5e-5 * 0.5)


@pytest.mark.parametrize("warmup", [1, 1.0])
def test_a_warmup_of_one_is_one_step_and_not_the_whole_run(warmup: float):
    values = {"learning_rate": 1.0, "lr_scheduler_type": "constant_with_warmup"}
    rate = learning_rate_schedule(config(warmup_steps=warmup, **values), 10)
    assert [rate(step) for step in (0, 1, 9)] == [0.0, 1.0, 1.0]


KINDS = ["linear", "cosine", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup"]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 300),
    st.one_of(st.integers(0, 310), st.sampled_from([1.0, 2.0, 0.0]), st.integers(1, 99).map(lambda n: n / 100)),
)
@example("linear", 1, 0)
@example("linear", 1, 1)  # a run that ends before its warm-up does
@example("cosine", 2, 1.0)
@example("linear", 100, 0.29)
@example("polynomial", 3, 3)
@example("inverse_sqrt", 3, 4)
@example("inverse_sqrt", 2, 0)
def test_learning_rates_match_the_reference(kind: str, total: int, warmup: float):
    values = {"learning_rate": 3e-4, "lr_scheduler_type": kind, "warmup_steps": warmup}
    schedule = learning_rate_schedule(config(**values), total)
    options = Options(global_batch=1, total_samples=total, total_steps=total, **values)
    steps = sorted({0, 1, int(warmup) - 1, int(warmup), total // 2, total - 1} & set(range(total)))
    expected = [3e-4 * factor(step, options) for step in steps]
    assert [schedule(step) for step in steps] == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(("warmup", "steps"), [(0.01, 1), (0.07, 8), (0.14, 15), (0.29, 29), (0.57, 57), (0.99, 99)])
def test_a_share_of_warmup_is_multiplied_and_then_rounded_up_as_in_transformers(warmup: float, steps: int):
    """In binary, 100 * 0.07 is slightly more than 7, and 100 * 0.29 slightly less than 29."""
    values = {"learning_rate": 1.0, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": warmup}
    schedule = learning_rate_schedule(config(**values), 100)
    assert [schedule(step) < 1 for step in range(100)] == [True] * steps + [False] * (100 - steps)


PARTS = [None, 0, 1, 3, 0.25, 1.0]


@pytest.mark.parametrize("total", [1, 2, 4, 7])
@pytest.mark.parametrize("warmup", [0, 1, 2, 0.29])
def test_warmup_plateau_and_decay_add_up_to_the_run_or_are_refused(total: int, warmup: float):
    for stable, decay in product(PARTS, PARTS):
        parts = {"num_stable_steps": stable, "num_decay_steps": decay, "decay_type": "linear"}
        parts = {key: value for key, value in parts.items() if value is not None}
        values = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": warmup, "learning_rate": 1.0}
        given = config(**values, lr_scheduler_kwargs=parts)
        before = steps_of(warmup, total)
        plateau = None if stable is None else steps_of(stable, total)
        if decay is None and plateau is not None:
            after = max(0, total - before - plateau)
        else:
            after = steps_of(0.1 if decay is None else decay, total)
        if before + after > total or plateau not in (None, total - before - after):
            with pytest.raises(ConfigError, match="do not fit into a run of"):
                learning_rate_schedule(given, total)
            continue
        schedule = learning_rate_schedule(given, total)
        values["lr_scheduler_kwargs"] = {"num_decay_steps": after, "decay_type": "linear"}
        options = Options(global_batch=1, total_samples=1, total_steps=total, **values)
        expected = [factor(step, options) for step in range(total)]
        assert [schedule(step) for step in range(total)] == pytest.approx(expected, rel=1e-12), parts
