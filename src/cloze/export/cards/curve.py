"""The loss curves of a run for its model card: an SVG from the lines of metrics.jsonl.

text = loss_curve(read_lines)        # None without two points
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cloze.utils.foreign.lenient_read import is_number

CURVE = "loss.svg"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 320, 56, 16, 16, 40
MOST_POINTS = 400
Points = list[tuple[float, float]]  # (step, loss)
_SERIES = (("loss", "training", "#4c72b0"), ("eval_loss", "validation", "#dd8452"))


def loss_curve(lines: Sequence[dict[str, Any]]) -> str | None:
    """Return an SVG of training and validation loss (nats per masked token) by step; None without two points."""
    curves = [(thinned(points_of(lines, key)), label, colour) for key, label, colour in _SERIES]
    drawn = [one for one in curves if one[0]]
    if not any(len(points) > 1 for points, _, _ in drawn):
        return None
    everything = [point for points, _, _ in drawn for point in points]
    steps, losses = ticks(0.0, max(step for step, _ in everything)), [loss for _, loss in everything]
    levels = ticks(min(losses), max(losses))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]

    def place(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (step - steps[0]) / (steps[-1] - steps[0]) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (loss - levels[0]) / (levels[-1] - levels[0]) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    for level in levels:
        _, y = place(steps[0], level)
        parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end" fill="#555555">{level:g}</text>')
    for step in steps:
        x, _ = place(step, levels[0])
        parts.append(f'<text x="{x}" y="{HEIGHT - 22}" text-anchor="middle" fill="#555555">{step:g}</text>')
    parts.append(f'<text x="{WIDTH // 2}" y="{HEIGHT - 6}" text-anchor="middle" fill="#555555">optimizer step</text>')
    for number, (points, label, colour) in enumerate(drawn):
        places = [place(*point) for point in points]
        joined = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(places) < 40:
            parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in places]
        y = TOP + 14 + 18 * number
        parts.append(f'<text x="{WIDTH - RIGHT - 8}" y="{y}" text-anchor="end" fill="{colour}">{label} loss</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def points_of(lines: Sequence[dict[str, Any]], key: str) -> Points:
    """Return (step, value) of the lines that have a finite value."""
    found: list[tuple[Any, Any]] = [(line.get("step"), line.get(key)) for line in lines]
    return [(float(s), float(v)) for s, v in found if is_number(s) and is_number(v)]


def thinned(points: Points) -> Points:
    """Return at most MOST_POINTS points, each the mean of its neighbours, for the width of the picture."""
    group = -(-len(points) // MOST_POINTS)
    if group < 2:
        return points
    parts = [points[at : at + group] for at in range(0, len(points), group)]
    return [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in parts]


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Return round numbers from at most `low` to at least `high`, evenly spaced, about `wanted` of them."""
    span = max(high - low, abs(high) * 1e-6, 1e-9)
    size = 10 ** math.floor(math.log10(span / wanted))
    step = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= wanted)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [round(number * step, 12) for number in range(first, last + 1)]
