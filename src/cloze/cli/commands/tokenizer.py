"""`cloze tokenizer`: train a tokenizer on a corpus, or extend a pretrained one."""

from __future__ import annotations

import time

from cloze.config import TokenizerConfig
from cloze.data.tokenizer_training.extend import make_tokenizer
from cloze.utils.terminal.console import duration, say


def run(config: TokenizerConfig) -> None:
    """Train or extend, and print what was made."""
    begin = time.monotonic()
    tokenizer, saving = make_tokenizer(config)
    if saving is not None:
        less = 100 * (1 - saving.after / saving.before)
        say(
            "tokenizer",
            f"{saving.added:,} tokens added; the corpus' words: {saving.before:,} tokens before, {saving.after:,} now "
            f"({less:.2f} % fewer)",
        )
        say("next", f"cloze grow MODEL --tokenizer {config.output} --output GROWN")
    say(
        "tokenizer",
        f"{len(tokenizer.get_vocab()):,} tokens -> {config.output} in {duration(time.monotonic() - begin)}",
        result=config.output,
    )
