"""`cloze report RUN [RUN2 ...]`: a run, or several beside each other, as one HTML file."""

from __future__ import annotations

from cloze.config import ReportConfig
from cloze.tools.report.write import write_report
from cloze.utils.terminal.console import say


def run(config: ReportConfig) -> None:
    """Write the report, and print where it is."""
    file, size, lines = write_report(config)
    say("report", f"{lines:,} lines of metrics -> {file}, {size / 1000:,.0f} kB", result=file)
