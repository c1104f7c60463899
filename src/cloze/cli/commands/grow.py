"""`cloze grow`: make an initial model from a trained one."""

from __future__ import annotations

import time

from cloze.config import GrowConfig
from cloze.tools.grow.warm_start import warm_start
from cloze.utils.atomic_files import check_writable
from cloze.utils.terminal.console import duration, say


def run(config: GrowConfig) -> None:
    """Write the model and print its sources."""
    begin = time.monotonic()
    say("grow", f"{config.source} -> {config.output}")
    check_writable(config.output)
    done = warm_start(config)
    for name, (before, after) in done.changes.items():
        say("grow", f"{name}: {before:,} -> {after:,}")
    if done.tokens:
        say("grow", "tokens: " + ", ".join(f"{count:,} {kind}" for kind, count in done.tokens.items()))
    say("grow", f"{done.compared}; {duration(time.monotonic() - begin)}", result=config.output)
    say("next", f"cloze train --model_name_or_path {config.output} --dataset_name PREPARED --output_dir RUN")
