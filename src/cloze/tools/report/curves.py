"""Curves of a run's metrics: points by step and by time, smoothed, thinned to what a screen can show.

charts = charts_of(runs)        # [{"id": "loss", "title": "Loss", "curves": [{"run": 0, "kind": "raw", "step": ...}]}]
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloze.evaluation.metric_table import METRICS, Metric
from cloze.tools.report.gather import Run
from cloze.utils.foreign.lenient_read import is_number

MOST_POINTS, MOST_SMOOTH_POINTS = 2_000, 500
SMOOTHING = 0.01  # of the longest run's steps
Point = tuple[float, float, float]  # step, seconds of training, value


@dataclass(frozen=True)
class Chart:
    """What is drawn in one chart. `logged`: the metric of the training steps, `measured`: that of the evaluations;
    `style`: how its numbers are written (see charts.js); `from_zero`: the axis begins at 0; `smooth`: a smoothed curve
    beside the logged one."""

    name: str
    title: str
    unit: str
    style: str
    logged: str | None = None
    measured: str | None = None
    scale: str = "linear"
    from_zero: bool = False
    smooth: bool = False


def _chart_of(metric: Metric) -> Chart:
    title, style = metric.chart or metric.key, "percent" if metric.share else "short"
    measured = f"eval_{metric.key}"
    return Chart(
        metric.key, title, "of the evaluations", style, None, measured, scale=metric.scale, from_zero=metric.share
    )


CHARTS = (
    Chart("loss", "Loss", "nats per masked token", "decimal", "loss", "eval_loss", smooth=True),
    *(_chart_of(metric) for metric in METRICS if metric.chart is not None),
    Chart("throughput", "Throughput", "tokens per second", "short", "tokens_per_second", from_zero=True, smooth=True),
    Chart("memory", "Memory", "GiB, the highest so far", "decimal", "memory_gib", from_zero=True),
    Chart("learning_rate", "Learning rate", "", "power", "learning_rate", from_zero=True),
    Chart("grad_norm", "Gradient norm", "before clipping", "decimal", "grad_norm", from_zero=True, smooth=True),
    Chart("mfu", "Model FLOP utilisation", "of the device's peak", "percent", "mfu", from_zero=True),
)


def charts_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the charts that have something to show, as charts.js draws them, each with its text for those who see
    none."""
    span, clocks = SMOOTHING * max(run.last_step for run in runs), [clock_of(run.lines) for run in runs]
    found = []
    for chart in CHARTS:
        curves = [
            curve
            for number, (run, clock) in enumerate(zip(runs, clocks, strict=True))
            for curve in _curves(chart, run, number, clock, span)
        ]
        if curves:
            described = {key: getattr(chart, key) for key in ("name", "title", "unit", "style", "scale")}
            alt = describe(chart, runs, curves)
            found.append({**described, "fromZero": chart.from_zero, "alt": alt, "curves": curves})
    return found


def _curves(chart: Chart, run: Run, number: int, clock: Sequence[float], span: float) -> list[dict[str, Any]]:
    curves = []
    if chart.logged and (points := points_of(run.lines, chart.logged, clock)):
        curves.append(_curve(number, "raw" if chart.smooth else "line", thinned(points, MOST_POINTS)))
        if chart.smooth:
            curves.append(_curve(number, "smooth", smoothed(points, span, MOST_SMOOTH_POINTS)))
    if chart.measured and (points := points_of(run.lines, chart.measured, clock)):
        curves.append(_curve(number, "measured", thinned(points, MOST_POINTS)))
    if chart.scale == "log":  # whose zero is nowhere
        return [one for one in curves if min(one["value"]) > 0]
    return curves


def _curve(number: int, kind: str, points: Sequence[Point]) -> dict[str, Any]:
    steps, seconds, values = zip(*points, strict=True)
    return {
        "run": number,
        "kind": kind,
        "step": [int(step) if step == int(step) else step for step in steps],
        "time": [round(one, 2) for one in seconds],
        "value": [float(f"{value:.7g}") for value in values],
    }


def points_of(lines: Sequence[dict[str, Any]], key: str, clock: Sequence[float]) -> list[Point]:
    """Return the lines that have a finite value, as points; `clock`: see `clock_of`."""
    return [
        (line["step"], seconds, value)
        for line, seconds in zip(lines, clock, strict=True)
        if (value := line.get(key)) is not None
        and ((value.__class__ is float and value - value == 0.0) or is_number(value))
    ]


def clock_of(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Return the seconds of training up to each line, without pauses between sessions and evaluations."""
    clock, seconds = [], 0.0
    for line in lines:
        spent = line.get("seconds")
        if spent is not None and is_number(spent):
            seconds += spent
        clock.append(seconds)
    return clock


def smoothed(points: Sequence[Point], span: float, most: int) -> list[Point]:
    """Return the means around at most `most` evenly chosen points.

    A value `span` steps before or after counts 1/e: from both sides, so that a smoothed curve does not lag
    behind. Divided by the sum of the weights, so that neither end is drawn towards zero.
    """
    past, weights = _one_sided(points, span)
    future, others = _one_sided(points[::-1], span)
    count, last = min(len(points), most), len(points) - 1
    found = []
    for number in range(count):
        at = number * last // max(1, count - 1)
        step, seconds, value = points[at]
        mean = (past[at] + future[last - at] - value) / (weights[at] + others[last - at] - 1.0)
        found.append((step, seconds, mean))
    return found


def _one_sided(points: Sequence[Point], span: float) -> tuple[list[float], list[float]]:
    """Return, for each point, the weighted sum of the values up to it, and the sum of the weights."""
    totals, weights = [], []
    total, weight, before, gap, kept = 0.0, 0.0, points[0][0], 0.0, 1.0
    for step, _, value in points:
        if abs(step - before) != gap:  # nearly always the same, and exp takes its time
            gap = abs(step - before)
            kept = math.exp(-gap / span) if span > 0 else 0.0
        total, weight, before = total * kept + value, weight * kept + 1.0, step
        totals.append(total)
        weights.append(weight)
    return totals, weights


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most `most` points: the first and the last one, and the lowest and highest of equal parts between
    them, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    values = [value for _, _, value in points]
    parts, inside = (most - 2) // 2, len(points) - 2
    found = [points[0]]
    for number in range(parts):
        first, end = 1 + number * inside // parts, 1 + (number + 1) * inside // parts
        some = values[first:end]
        found += [points[first + at] for at in sorted({some.index(min(some)), some.index(max(some))})]
    return [*found, points[-1]]


def describe(chart: Chart, runs: Sequence[Run], curves: Sequence[dict[str, Any]]) -> str:
    """Return a chart in words: first, last, lowest and highest value of each curve."""
    words = [f"{chart.title}{f', {chart.unit},' if chart.unit else ''} by optimizer step."]
    for curve in curves:
        if curve["kind"] == "smooth":
            continue
        steps, values = curve["step"], curve["value"]
        what = f"{runs[curve['run']].name}{', validation' if chart.logged and curve['kind'] == 'measured' else ''}"
        if len(values) == 1:
            words.append(f"{what}: {values[0]:.4g} at step {steps[0]:,}.")
            continue
        low, high = (pick(range(len(values)), key=values.__getitem__) for pick in (min, max))
        words.append(
            f"{what}: from {values[0]:.4g} at step {steps[0]:,} to {values[-1]:.4g} at step {steps[-1]:,}; lowest "
            f"{values[low]:.4g} at step {steps[low]:,}, highest {values[high]:.4g} at step {steps[high]:,}."
        )
    return " ".join(words)


def restarts_of(run: Run) -> list[dict[str, Any]]:
    """Return the restarts of a run, by step and time, with their devices, for the marks on the axis."""
    starts, clock = [], clock_of(run.lines) if run.restarts else []
    steps = [line["step"] for line in run.lines]
    for session in run.restarts:
        before = bisect_right(steps, session["first_step"])
        spent = clock[before - 1] if before else 0.0
        starts.append({"step": session["first_step"], "time": round(spent, 2), "what": computed_on(session)})
    return starts


def computed_on(session: dict[str, Any]) -> str:
    """Return the hardware and engine of a session in words: `2 x NVIDIA H100; 2 ranks on 1 host, DeepSpeed ZeRO-2,
    bf16`."""
    devices = session.get("devices")
    named = [f"{count} x {device}" for device, count in devices.items()] if isinstance(devices, dict) else []
    ranks, hosts = session.get("ranks"), session.get("hosts")
    world = f"{ranks} rank{'s' * (ranks != 1)} on {hosts} host{'s' * (hosts != 1)}"
    return "; ".join([*named, ", ".join([world, *(str(session[k]) for k in ("engine", "precision") if k in session)])])
