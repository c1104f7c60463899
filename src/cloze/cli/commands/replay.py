"""`cloze replay`: the batch of one step of a run."""

from __future__ import annotations

from cloze.config import ReplayConfig
from cloze.tools.inspect.replay import replay


def run(config: ReplayConfig) -> None:
    """Rebuild the batch, show it decoded, store it where asked."""
    replay(config)
