"""`cloze prepare`: turn a corpus into fixed blocks of tokens."""

from __future__ import annotations

import time
from pathlib import Path

from cloze.config import PrepareConfig
from cloze.data.prepare.pipeline import prepare
from cloze.data.prepared.text_report import report_lines
from cloze.tools.inspect.prepared import split_line
from cloze.utils.atomic_files import check_writable
from cloze.utils.terminal.console import duration, say, warn


def run(config: PrepareConfig) -> None:
    """Prepare, then say what there is now."""
    prepare_and_tell(config)


def prepare_and_tell(config: PrepareConfig) -> bool:
    """The same; returns whether the folder is whole, which it is not while other shards are at work."""
    begin = time.monotonic()
    if not Path(config.output).exists():
        check_writable(config.output)
    manifest = prepare(config)
    if manifest is None:
        return False
    for name in manifest["splits"]:
        say("prepare", f"{name}: {split_line(manifest, name)}")
    for name, line in report_lines(manifest.get("text_report", {})).items():
        say("prepare", f"{name}: {line}")
    if bad := manifest.get("bad_records"):
        warn(f"left out: {', '.join(f'{count:,} records ({reason})' for reason, count in bad.items())}")
        for line in manifest["bad_record_examples"][:3]:
            warn(f"  {line}")
    say("prepare", f"written to {config.output} in {duration(time.monotonic() - begin)}", result=config.output)
    return True
