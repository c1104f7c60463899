"""`cloze train`: train a model on a prepared folder."""

from __future__ import annotations

from cloze.config import TrainConfig
from cloze.tools.api.train_here import train_here
from cloze.utils.shareable import with_secrets
from cloze.utils.terminal.console import say


def run(config: TrainConfig) -> None:
    """Train, then print what to do next."""
    folder = train_here(with_secrets(config))
    if config.save_strategy != "no":
        say("next", f"cloze consolidate {folder}")
