"""The report in a real browser: what is drawn is what was logged, it can be pointed at, fits a phone, is dark in the
dark, and asks nobody for anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Chromium
from report_pages import curve_of, lines_of, make_run, page_of

# Where the curve of a chart lies in the numbers of its axes: the path's places, measured by the labels of the ticks.
PLOTTED = """(() => {
    const figure = [...document.querySelectorAll("figure")].find((one) => one.querySelector("h3").textContent === %r);
    const ticks = (name, at) => [...figure.querySelectorAll(name)].map((one) => {
        const shape = one.getBBox();
        return [one.textContent, Number(one.getAttribute(at)), shape.y + shape.height / 2];
    });
    const lines = [...figure.querySelectorAll("line.grid")].map((one) => Number(one.getAttribute("y1")));
    const path = figure.querySelector("path[data-run='%d'][data-kind=%s]").getAttribute("d");
    return {x: ticks(".xtick", "x"), y: ticks(".ytick", "y"), lines, path};
})()"""
HOVER = """(() => {
    const plot = document.querySelectorAll(".plot")[%d];
    plot.scrollIntoView({block: "center"});
    const svg = plot.querySelector("svg"), box = svg.getBoundingClientRect(), inside = svg.viewBox.baseVal;
    const path = svg.querySelector("path[data-run='0']").getAttribute("d").slice(1).split("L");
    const [x, y] = path[%d].split(" ").map(Number);
    return [box.left + x * box.width / inside.width, box.top + y * box.height / inside.height];
})()"""
TOOLTIP = """(() => [...document.querySelectorAll(".tip")].filter((one) => !one.hidden).map((one) =>
    [one.querySelector(".head").textContent, ...[...one.querySelectorAll("tr, p")].map((row) =>
        [...row.children].map((cell) => cell.textContent).join("|") || row.textContent)]))()"""


def number(text: str) -> float:
    """What a tick's label says: `1,200`, `1.5k`, `4e-3`."""
    text = text.replace(",", "").removesuffix(" %")
    return float(text[:-1]) * 1000 if text.endswith("k") else float(text)


def plotted(page: Chromium, title: str, run: int, kind: str) -> list[tuple[float, float]]:
    """(step, value) of a curve as it stands in the picture."""
    seen: dict[str, Any] = page.run(PLOTTED % (title, run, kind))
    (x0, at0), (x1, at1) = [(number(text), at) for text, at, _ in seen["x"]][:2]
    (low, bottom), (high, top) = [(number(text), y) for (text, _, _), y in zip(seen["y"], seen["lines"], strict=True)][
        :: len(seen["y"]) - 1
    ]
    points = [tuple(map(float, one.split())) for one in seen["path"][1:].split("L")]
    return [
        (x0 + (x - at0) / (at1 - at0) * (x1 - x0), low + (y - bottom) / (top - bottom) * (high - low))
        for x, y in points
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: on Debian, apt-get install chromium")
def test_a_browser_draws_what_was_logged_and_asks_nobody(tmp_path: Path):
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", lines_of(100, offset=1.0))]
    report = tmp_path / "report.html"
    report.write_text(page_of(*runs))
    with Chromium() as page:
        page.open(report, width=1200, height=900)
        for title, key, kind in (
            ("Loss", "loss", "raw"),
            ("Loss", "eval_loss", "measured"),
            ("Throughput", "tokens_per_second", "raw"),
            ("Gradient norm", "grad_norm", "raw"),
            ("Memory", "memory_gib", "line"),
        ):
            for run, lines in enumerate((lines_of(), lines_of(100, offset=1.0))):
                logged = [(line["step"], line[key]) for line in lines if key in line]
                drawn = plotted(page, title, run, kind)
                size = max(value for _, value in logged)
                assert [step for step, _ in drawn] == pytest.approx([step for step, _ in logged], abs=0.1)
                assert [v for _, v in drawn] == pytest.approx([v for _, v in logged], abs=2e-4 * size), (title, run)

        point_and_read(page, report.read_text())
        hide_and_turn(page)

        page.open(report, width=390, height=844, dark=True)
        assert page.run("[document.documentElement.scrollWidth, window.innerWidth]") == [390, 390]
        red, green, blue = map(
            int, page.run("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")
        )
        assert max(red, green, blue) < 40
        assert plotted(page, "Loss", 0, "raw")[0] == pytest.approx((5, lines_of()[1]["loss"]), abs=0.05)
        page.open(report, width=390, height=844)
        assert (
            min(map(int, page.run("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(","))) > 220
        )

        told = [one for one in page.events if one["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        told += [one for one in page.events if one["method"] == "Runtime.consoleAPICalled"]
        assert told == []
        asked = [
            one["params"]["request"]["url"] for one in page.events if one["method"] == "Network.requestWillBeSent"
        ]
        assert {url for url in asked if not url.startswith("data:")} == {report.resolve().as_uri()}


def point_and_read(page: Chromium, report: str) -> None:
    """The tooltip gives the step and the value of every run, by mouse and by keyboard."""
    line, other = lines_of()[4], lines_of(100, offset=1.0)[4]
    page.move_mouse(*page.run(HOVER % (0, 3)))
    ((head, *rows),) = page.run(TOOLTIP)
    assert head == "step 20"
    assert [row.split("|")[:2] for row in rows[:3]] == [
        ["first", f"{line['loss']:.4f}"],
        ["first", "7.0000"],
        ["second", f"{other['loss']:.4f}"],
    ]
    smoothed = curve_of(report, "loss", "smooth")
    assert rows[0].endswith(f"|{smoothed['value'][smoothed['step'].index(20)]:.4f} smoothed")
    assert rows[1] == "first|7.0000|validation"
    assert rows[-2:] == [
        f"{name} started again after step 20: 8 x NVIDIA H100; 8 ranks on 2 hosts, DeepSpeed ZeRO-2, bf16"
        for name in ("first", "second")
    ]
    page.run("document.querySelectorAll('.plot')[0].focus()")
    page.press("Home")
    page.press("ArrowRight")
    ((head, *rows),) = page.run(TOOLTIP)
    assert head == "step 10"
    assert rows[0].startswith(f"first|{lines_of()[2]['loss']:.4f}|")
    assert f"; first {lines_of()[2]['loss']:.4f}" in page.run("document.querySelector('[role=status]').textContent")
    page.press("Escape")
    assert page.run(TOOLTIP) == []


def hide_and_turn(page: Chromium) -> None:
    """A run can be hidden, and x can be time."""
    page.run("document.querySelectorAll('.runs button')[1].click()")
    assert page.run("document.querySelectorAll('path[data-run=\"1\"]').length") == 0
    page.run("document.querySelector('[data-axis=time]').click()")
    page.move_mouse(*page.run(HOVER % (0, 3)))
    ((head, *_),) = page.run(TOOLTIP)
    assert head == "0:08, step 20"
    labels = page.run(
        "[...document.querySelectorAll('svg')[1].querySelectorAll('.xtick')].map((one) => one.textContent)"
    )
    assert labels[0] == "0:00"
    assert labels[-1] in ("0:20", "0:24")
