"""`cloze push`: publish a model with its card, and the blocks it was trained on, on the Hub."""

from __future__ import annotations

from cloze.config import PushConfig
from cloze.export.hub.push import push


def run(config: PushConfig) -> None:
    """Push, and print the address on the Hub."""
    push(config)
