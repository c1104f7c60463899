"""`cloze consolidate`: turn a checkpoint into a model folder."""

from __future__ import annotations

import time

from cloze.config import ConsolidateConfig
from cloze.export.consolidation.consolidate import consolidate
from cloze.utils import run_files
from cloze.utils.terminal.console import duration, say


def run(config: ConsolidateConfig) -> None:
    """Consolidate, and print what was done and what to do next."""
    begin = time.monotonic()
    folder, compared = consolidate(config)
    took = duration(time.monotonic() - begin)
    say("consolidate", f"checksums as in the checkpoint; reloaded; {compared}; {took}", result=folder)
    run = folder.parent if config.output is None else None
    known = run is not None and (run / run_files.DATA).is_file()
    say("next", f"cloze evaluate {run or folder}" + ("" if known else " --data PREPARED"))
