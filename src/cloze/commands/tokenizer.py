"""`cloze tokenizer`: train a tokenizer on a corpus."""

from __future__ import annotations

import time

from cloze.config import TokenizerConfig
from cloze.console import duration, say
from cloze.data.train_tokenizer import train_tokenizer


def run(config: TokenizerConfig) -> None:
    """Train, then say what there is now."""
    begin = time.monotonic()
    tokenizer = train_tokenizer(config)
    say("tokenizer", f"{len(tokenizer):,} tokens -> {config.output} in {duration(time.monotonic() - begin)}")
