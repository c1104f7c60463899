"""Write the report of runs as one HTML file, as `cloze report` does."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import NamedTuple

from cloze.config import ReportConfig
from cloze.errors import ConfigError
from cloze.tools.report.gather import gather_runs, read_prompts
from cloze.tools.report.page import render
from cloze.tools.report.scores import Filled
from cloze.utils.atomic_files import write_text
from cloze.utils.output_file import check_output_file
from cloze.utils.terminal.console import warn

FILE = "report.html"


class Report(NamedTuple):
    """The file that was written, its size, and how many lines of metrics it shows."""

    file: Path
    num_bytes: int
    lines: int


def write_report(config: ReportConfig) -> Report:
    """Write the report. Raises ConfigError, DataError or DiskError; with prompts also ModelError, CheckpointError."""
    if not config.runs:
        raise ConfigError("give a run's folder", where="cloze report", hint="cloze report runs/mine")
    gc.disable()  # of some 100,000 mappings none is in a cycle, and looking for cycles takes a fifth of the time
    try:
        return _write(config)
    finally:
        gc.enable()


def _write(config: ReportConfig) -> Report:
    hint = "put it elsewhere with --output FILE"
    if config.output:
        check_output_file(config.output, hint)
    runs = gather_runs(config.runs)
    output = Path(config.output) if config.output else runs[0].folder / FILE
    file = check_output_file(output, hint)
    for one in runs:
        if one.scores_note and (one.measured or not one.scores):  # records of older versions lack it
            warn(f"{one.folder}: {one.scores_note}")
    filled: list[Filled] = []
    if texts := read_prompts(config.prompts) if config.prompts else []:
        from cloze.tools.report.examples import fill_prompts  # loads torch, which nothing else here does

        filled = fill_prompts(runs, texts)
    text = render(runs, filled)
    write_text(file, text)
    lines = sum(len(one.lines) for one in runs)
    return Report(output, len(text.encode()), lines)
