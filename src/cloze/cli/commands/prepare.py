"""`cloze prepare`: turn a corpus into fixed blocks of tokens."""

from __future__ import annotations

import time

from cloze.config import PrepareConfig
from cloze.data.prepare.pipeline import prepare
from cloze.data.prepared.text_report import report_lines
from cloze.tools.inspect.prepared import split_line
from cloze.utils.terminal.console import duration, say


def run(config: PrepareConfig) -> None:
    """Prepare, and print the contents of the folder."""
    begin = time.monotonic()
    manifest = prepare(config)
    if manifest is None:  # other shards are still to come
        return
    for name in manifest["splits"]:
        say("prepare", f"{name}: {split_line(manifest, name)}")
    for name, line in report_lines(manifest.get("text_report", {})).items():
        say("prepare", f"{name}: {line}")
    say("prepare", f"written to {config.output} in {duration(time.monotonic() - begin)}", result=config.output)
