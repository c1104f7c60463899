"""`cloze train`: train a model on a prepared folder."""

from __future__ import annotations

from cloze.config import TrainConfig
from cloze.console import say
from cloze.train.trainer import train


def run(config: TrainConfig) -> None:
    """Train, then say what to do next."""
    folder = train(config)
    if config.save_strategy != "no":
        say("next", f"cloze consolidate {folder}")
