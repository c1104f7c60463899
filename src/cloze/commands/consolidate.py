"""`cloze consolidate`: turn a checkpoint into a model folder."""

from __future__ import annotations

import time
from pathlib import Path

from cloze.config import ConsolidateConfig
from cloze.console import duration, say
from cloze.consolidate import choose_checkpoint, consolidate
from cloze.files import parse_size


def run(config: ConsolidateConfig) -> None:
    """Consolidate and say what to do next."""
    max_shard_bytes = parse_size(config.max_shard_size, "--max_shard_size")
    begin = time.monotonic()
    checkpoint = choose_checkpoint(Path(config.checkpoint))
    output = Path(config.output) if config.output else checkpoint.parent / "model"
    say("consolidate", f"{checkpoint} -> {output}")
    difference = consolidate(checkpoint, output, max_shard_bytes)
    took = duration(time.monotonic() - begin)
    say("consolidate", f"reloaded; logits as in training to {difference:.0e} of the largest; {took}")
    say("next", f"cloze evaluate {output.parent if config.output is None else output} --data PREPARED")
