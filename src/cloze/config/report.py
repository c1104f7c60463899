"""A report of runs."""

from __future__ import annotations

from dataclasses import dataclass

from cloze.config.ranges import Ranged


@dataclass(kw_only=True)
class ReportConfig(Ranged):
    """Write a report of one run, or of several beside each other, as one HTML file.

    It needs nothing else, no network either: curves, restarts, evaluations with their intervals, data, machines,
    checkpoints, configuration. Lines of metrics.jsonl that are damaged are left out, and counted.
    """

    runs: list[str]
    """the runs' folders, one after the other: `cloze report runs/a runs/b`"""
    output: str | None = None
    """the file to write (default: report.html in the first run's folder)"""
    prompts: str | None = None
    """a text file with a mask in each line: also show how they are filled, before training (by the weights the run
    began with, where they are a folder here, else by its first checkpoint) and after; this loads the models"""
