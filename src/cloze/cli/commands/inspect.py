"""`cloze inspect`: show the contents of a prepared folder."""

from __future__ import annotations

from cloze.config import InspectConfig
from cloze.tools.inspect.prepared import inspect_prepared


def run(config: InspectConfig) -> None:
    """Print counts, how blocks are filled, and some blocks as text; with --verify check every byte."""
    inspect_prepared(config)
