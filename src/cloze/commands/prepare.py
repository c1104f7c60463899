"""`cloze prepare`: turn a corpus into fixed blocks of tokens."""

from __future__ import annotations

import time

from cloze.config import PrepareConfig
from cloze.console import duration, say
from cloze.data.prepare import prepare


def run(config: PrepareConfig) -> None:
    """Prepare, then say what there is now."""
    begin = time.monotonic()
    manifest = prepare(config)
    for name, facts in manifest["splits"].items():
        empty = f" ({facts['empty_documents']:,} empty)" if facts["empty_documents"] else ""
        say(
            "prepare",
            f"{name}: {facts['documents']:,} documents{empty}, {facts['tokens']:,} tokens -> "
            f"{facts['blocks']:,} blocks of {manifest['block_size']}; {facts['dropped_tokens']} tokens left over",
        )
    say("prepare", f"written to {config.output} in {duration(time.monotonic() - begin)}")
