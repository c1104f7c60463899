"""`cloze completion SHELL`: print what makes a shell complete commands, options and their values."""

from __future__ import annotations

from cloze.cli.completion import script
from cloze.config import CompletionConfig
from cloze.utils.terminal.console import show


def run(config: CompletionConfig) -> None:
    """Print the script."""
    show(script(config.shell))
