"""`cloze train`: train a model on a prepared folder."""

from __future__ import annotations

from contextlib import nullcontext

from cloze.config import TrainConfig
from cloze.console import say
from cloze.train.trainer import train


def run(config: TrainConfig) -> None:
    """Train, then say what to do next. With --push_to_hub what is saved goes to the Hub meanwhile."""
    if config.push_to_hub:
        from cloze.follow import following
    with following(config) if config.push_to_hub else nullcontext():
        folder = train(config)
    if config.save_strategy != "no":
        say("next", f"cloze consolidate {folder}")
