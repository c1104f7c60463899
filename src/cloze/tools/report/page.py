"""The whole page: one HTML file that asks for nothing else.

write_text("report.html", render(gather_runs(["runs/a", "runs/b"])))
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from cloze import __version__
from cloze.tools.report.curves import MOST_POINTS, SMOOTHING, charts_of, restarts_of
from cloze.tools.report.gather import Run
from cloze.tools.report.markup import Html, element, joined, section, text
from cloze.tools.report.scores import Filled, section_of_answers, section_of_scores
from cloze.tools.report.sections import (
    checkpoints_section,
    configuration_section,
    data_section,
    headline,
    lead,
    machines_section,
)
from cloze.utils.terminal.redact import redacted

_PLACE = re.compile(r"\{\{(\w+)\}\}")
STYLES = {"loss": "faint: as logged; solid: smoothed; dots: validation", "smooth": "faint: as logged; solid: smoothed"}


def render(runs: Sequence[Run], filled: Sequence[Filled] = ()) -> str:
    """Return the page of these runs, the first one in the first colour. The same runs give the same text."""
    charts = charts_of(runs)
    *first, last = [text(run.name) for run in runs]
    heading = Html(f"{'<span>,</span> '.join(first)} <span>and</span> {last}" if first else last)
    several = len(runs) > 1
    sections = [
        damaged_note(runs),
        headline(runs),
        _curves_section(charts),
        section_of_scores(runs),
        section_of_answers(filled, several),
        data_section(runs),
        machines_section(runs),
        checkpoints_section(runs),
        configuration_section(runs),
    ]
    values = {
        "title": text(f"{', '.join(run.name for run in runs)}: training report"),
        "generator": text(f"cloze {__version__}"),
        "heading": heading,
        "lead": text(lead(runs)),
        "sections": Html("\n".join(one for one in sections if one)),
        "footer": footer(runs),
        "style": _file("style.css"),
        "script": _file("charts.js"),
        "data": embedded({"runs": [_told(run) for run in runs], "charts": charts}),
    }
    return redacted(_PLACE.sub(lambda place: values[place[1]], _file("page.html")))


def embedded(value: Any) -> str:
    """Return JSON that is safe in a script element: without `</script>` and `<!--`."""
    notes = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return notes.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def damaged_note(runs: Sequence[Run]) -> Html:
    """Return what could not be read of the metrics."""
    notes = [f"{run.name}: {damaged_line(run.damaged_lines)}" for run in runs if run.damaged_lines]
    return element("p", "; ".join(notes), class_="warning") if notes else Html("")


def damaged_line(count: int) -> str:
    """Return the message: `2 damaged lines of metrics.jsonl were left out`."""
    return f"{count:,} damaged line{'s' * (count > 1)} of metrics.jsonl {'were' if count > 1 else 'was'} left out"


def footer(runs: Sequence[Run]) -> Html:
    """Return a line on how the curves were made, and by which version."""
    longest = max(run.last_step for run in runs)
    span = max(1, round(SMOOTHING * longest))
    words = [
        f"Curves have at most {MOST_POINTS:,} points: of longer ones the lowest and the highest of equal parts are "
        f"kept. Smoothed: means in which a value {span:,} steps before or after counts 1/e. Time is that of training: "
        "no pauses, no evaluations, nothing that was done again. Arrow keys move along a chart that is "
        "focused. Triangles with dotted lines: the run was started again there.",
        f"Made by cloze {__version__} from the run's own files. This page asks for nothing from any network.",
    ]
    return joined(element("p", one) for one in words)


def _curves_section(charts: Sequence[dict[str, Any]]) -> Html:
    figures = [_figure(number, chart) for number, chart in enumerate(charts)]
    if not figures:
        return Html("")
    empty = Html("<noscript><p class=note>The curves are drawn by JavaScript, which is off.</p></noscript>")
    bar = Html('<div class="toolbar" id="toolbar"></div>')
    return section("Curves", bar, empty, element("div", joined(figures), class_="charts"))


def _figure(number: int, chart: dict[str, Any]) -> Html:
    kinds = {curve["kind"] for curve in chart["curves"]}
    styles = STYLES["smooth"] if "smooth" in kinds else ""
    if "smooth" in kinds and "measured" in kinds:
        styles = STYLES["loss"]
    caption = [element("h3", chart["title"]), element("span", chart["unit"]), element("span", styles, class_="styles")]
    plot = Html(f'<div class="plot" tabindex="0" role="group" aria-label="{text(chart["title"])}"></div>')
    inner = joined([element("figcaption", joined(one for one in caption if "></" not in one)), plot])
    return Html(f'<figure class="chart{" wide" if number == 0 else ""}" data-chart="{number}">{inner}</figure>')


def _told(run: Run) -> dict[str, Any]:
    return {"name": run.name, "restarts": restarts_of(run)}


def _file(name: str) -> str:
    return resources.files("cloze.tools.report").joinpath(name).read_text(encoding="utf-8").strip()
