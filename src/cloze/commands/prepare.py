"""`cloze prepare`: turn a corpus into fixed blocks of tokens."""

from __future__ import annotations

import time
from typing import Any

from cloze.config import PrepareConfig
from cloze.console import duration, say, warn
from cloze.data.prepare import prepare


def run(config: PrepareConfig) -> None:
    """Prepare, then say what there is now."""
    begin = time.monotonic()
    manifest = prepare(config)
    if manifest is None:
        return
    for name in manifest["splits"]:
        say("prepare", f"{name}: {split_line(manifest, name)}")
    if bad := manifest.get("bad_records"):
        warn(f"left out: {', '.join(f'{count:,} records ({reason})' for reason, count in bad.items())}")
        for line in manifest["bad_record_examples"][:3]:
            warn(f"  {line}")
    say("prepare", f"written to {config.output} in {duration(time.monotonic() - begin)}")


def split_line(manifest: dict[str, Any], name: str) -> str:
    """What became of a split's documents, in one line."""
    facts, size = manifest["splits"][name], manifest["block_size"]
    empty = f" ({facts['empty_documents']:,} empty)" if facts["empty_documents"] else ""
    fill = (facts["tokens"] - facts["dropped_tokens"]) / (facts["blocks"] * size)
    cut = facts["cut_documents"] / max(1, facts["documents"] - facts["empty_documents"])
    return (
        f"{facts['documents']:,} documents{empty}, {facts['tokens']:,} tokens -> "
        f"{facts['blocks']:,} blocks of {size}, "
        f"{fill:.1%} filled, {cut:.1%} of documents cut; {facts['dropped_tokens']} tokens left over"
    )
