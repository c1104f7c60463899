"""`cloze bench`: measure Cloze beside its peers."""

from __future__ import annotations

import importlib

from cloze.config import BenchConfig
from cloze.errors import ConfigError
from cloze.utils.output_file import check_output_file
from cloze.utils.terminal.console import is_main


def run(config: BenchConfig) -> None:
    """Measure, and print the table."""
    if config.gpu and config.what not in ("train", "step", "memory"):
        raise ConfigError(f"`bench {config.what}` uses no GPU", where="--gpu", hint="leave it out")
    output = check_output_file(config.output) if config.output else None
    module = importlib.import_module(f"cloze.tools.bench.{config.what}")  # each needs other packages
    table = getattr(module, f"bench_{config.what}")(config)
    if is_main():
        table.show(output)
