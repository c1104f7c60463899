"""The verdict on all findings, and how it is shown.

    rows = judge(findings)      # findings: as in the file that --json writes
    print(table(rows, width=100, colour=False))

`bad` (red): stops a run, or makes it wrong or many times slower; `warn`: may matter. Both give a remedy.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable

from cloze.tools.doctor.judge_cluster import judge_clocks, judge_disks, judge_ranks, judge_shared, judge_versions
from cloze.tools.doctor.judge_links import judge_links
from cloze.tools.doctor.judge_machine import judge_cpus, judge_gpus, judge_hub, judge_limits, judge_ops
from cloze.tools.doctor.rows import Findings, Row, count
from cloze.utils.foreign.paths import visible
from cloze.utils.terminal.console import show_coloured

JUDGES: tuple[Callable[[Findings], list[Row]], ...] = (
    judge_ranks,
    judge_versions,
    judge_links,
    judge_gpus,
    judge_shared,
    judge_disks,
    judge_clocks,
    judge_cpus,
    judge_limits,
    judge_ops,
    judge_hub,
)
MARKS = {"ok": "ok", "warn": "warn", "bad": "BAD"}
COLOURS = {"ok": "32", "warn": "33", "bad": "31;1"}  # ANSI: green, yellow, bold red
PIPED_WIDTH = 120


def judge(findings: Findings) -> list[Row]:
    """Return all rows, in the order in which they are printed."""
    return [row for one in JUDGES for row in one(findings)]


def table(rows: list[Row], width: int, colour: bool) -> str:
    """Return aligned lines of at most `width` characters: state, check and finding; below them the remedy."""
    margin = max(len(row.check) for row in rows) + 8
    lines = []
    for row in rows:
        mark = f"{MARKS[row.state]:<4}"
        if colour:
            mark = f"\033[{COLOURS[row.state]}m{mark}\033[0m"
        found, todo = (
            textwrap.wrap(visible(text), width - margin - less, break_on_hyphens=False, break_long_words=False)
            for text, less in ((row.found, 0), (row.todo, 3))
        )
        lines.append(f"{mark}  {row.check:<{margin - 8}}  {''.join(found[:1])}")
        lines += [" " * margin + line for line in found[1:]]
        lines += [" " * margin + ("-> " if number == 0 else "   ") + line for number, line in enumerate(todo)]
    bad, warnings = (sum(row.state == state for row in rows) for state in ("bad", "warn"))
    verdict = f"{count(bad, 'red row')}: mend that first" if bad else "nothing is red"
    return "\n".join([*lines, "", f"{verdict}; {count(warnings, 'warning')}"])


def show(rows: list[Row]) -> None:
    """Print the table to stdout; in colour on a terminal, unless NO_COLOR is set (no-color.org)."""
    terminal = sys.stdout.isatty()
    width = max(60, shutil.get_terminal_size().columns) if terminal else PIPED_WIDTH
    show_coloured(table(rows, width, terminal and not os.environ.get("NO_COLOR")))
