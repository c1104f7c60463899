"""The picture of a run's loss: a drawing any browser can show, of the numbers that were logged."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest

from cloze.export.cards.curve import BOTTOM, HEIGHT, LEFT, MOST_POINTS, RIGHT, TOP, WIDTH, loss_curve, thinned, ticks

SVG = "{http://www.w3.org/2000/svg}"


def polylines(text: str) -> list[list[tuple[float, float]]]:
    found = ElementTree.fromstring(text).iter(f"{SVG}polyline")
    return [[tuple(map(float, pair.split(","))) for pair in one.attrib["points"].split()] for one in found]


def test_points_lie_where_their_numbers_say():
    lines = [{"step": 0, "loss": 8.0}, {"step": 50, "loss": 4.0}, {"step": 100, "loss": 2.0}]
    lines += [{"step": 100, "eval_loss": 5.0}]
    training, validation = polylines(loss_curve(lines))
    assert [x for x, _ in training] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    assert [y for _, y in training] == [TOP, TOP + (HEIGHT - BOTTOM - TOP) * 4 / 6, HEIGHT - BOTTOM]
    assert validation == [(WIDTH - RIGHT, TOP + (HEIGHT - BOTTOM - TOP) / 2)]


def test_lines_without_a_number_are_left_out():
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": None},
        {"step": 3, "skipped": True},
        {"step": 4, "loss": 2.0},
    ]
    assert len(polylines(loss_curve([*lines, {"step": 5, "loss": float("nan")}]))[0]) == 2


@pytest.mark.parametrize("lines", [[], [{"step": 1, "loss": 3.0}], [{"step": 1}, {"loss": 2.0}]])
def test_there_is_no_picture_of_nothing(lines: list[dict]):
    assert loss_curve(lines) is None


def test_a_loss_that_never_moves_can_be_drawn():
    (points,) = polylines(loss_curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 2.0}]))
    assert all(LEFT <= x <= WIDTH and TOP <= y <= HEIGHT - BOTTOM for x, y in points)


def test_a_long_run_is_a_small_picture_of_the_same_mean():
    lines = [{"step": step, "loss": 10.0 - step / 1e5} for step in range(100_000)]
    assert len(loss_curve(lines)) < 12_000
    short = thinned([(float(line["step"]), line["loss"]) for line in lines])
    assert len(short) <= MOST_POINTS
    assert sum(loss for _, loss in short) / len(short) == pytest.approx(9.5, abs=1e-4)


@pytest.mark.parametrize(("low", "high"), [(0, 7), (2.1, 2.13), (0, 1e6), (-3, 4), (5, 5), (0.0, 0.0)])
def test_ticks_are_round_and_hold_all_values(low: float, high: float):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 9
    steps = {round(b - a, 9) for a, b in itertools.pairwise(found)}
    assert len(steps) == 1
