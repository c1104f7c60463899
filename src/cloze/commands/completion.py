"""`cloze completion SHELL`: print what makes a shell complete commands, options and their values."""

from __future__ import annotations

from cloze.config import CompletionConfig
from cloze.console import show
from cloze.options.completion import script


def run(config: CompletionConfig) -> None:
    """Print the script."""
    show(script(config.shell))
