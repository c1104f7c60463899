"""Count the tokens that can be masked: those that are neither special nor unknown.

Text in an alphabet that a tokenizer does not know is nearly all [UNK]. Unknown tokens are never masked, so there would
be nothing to learn, and a loss that is 0 or not finite.

    check_maskable(blocks, manifest, "prepared/x")      # DataError without one; warns if they are few
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloze.data.batches.loader import BlockSource
from cloze.errors import DataError
from cloze.utils.terminal.console import warn

SAMPLE_BLOCKS = 256
FEW = 0.5  # warn below this share of the tokens
_BLOCKS_AT_ONCE = 8192


def maskable_share(blocks: NDArray[np.int32], manifest: dict[str, Any]) -> float:
    """Return the share of the tokens in blocks [n, S] that can be masked; padding is not counted as a token."""
    facts = manifest["tokenizer"]
    special = np.array(facts["special_token_ids"], np.int32)
    padding = facts.get("pad_token_id") if manifest.get("packing") == "best_fit" else None
    tokens = blocks.size if padding is None else int((blocks != padding).sum())
    return int((~np.isin(blocks, special)).sum()) / tokens if tokens else 0.0


def check_maskable(blocks: BlockSource, manifest: dict[str, Any], where: Path | str) -> None:
    """Check blocks from all parts of a split, and every block only if none of these has a token that can be masked.

    Raises DataError if no token can be masked. Warns if few can.
    """
    count = len(blocks)
    chosen = np.unique(np.linspace(0, count - 1, min(count, SAMPLE_BLOCKS)).astype(np.int64))
    share = maskable_share(blocks.read(chosen), manifest) if count else 0.0
    if share == 0.0 and not _any_maskable(blocks, manifest):
        raise DataError(
            "none of its tokens can be masked: all are special or unknown to the tokenizer",
            where=where,
            hint="see them with `cloze inspect`; prepare the corpus with a tokenizer that knows its script",
        )
    warn_of_few(share, where)


def warn_of_few(share: float, where: Path | str) -> None:
    """Warn if a small share of the tokens can be masked."""
    if share < FEW:
        warn(
            f"{where}: only {share:.1%} of its tokens can be masked, the others are special or unknown to the "
            "tokenizer; see them with `cloze inspect`"
        )


def _any_maskable(blocks: BlockSource, manifest: dict[str, Any]) -> bool:
    starts = range(0, len(blocks), _BLOCKS_AT_ONCE)
    ends = (min(first + _BLOCKS_AT_ONCE, len(blocks)) for first in starts)
    read = (blocks.read(np.arange(first, end)) for first, end in zip(starts, ends, strict=True))
    return any(maskable_share(each, manifest) > 0.0 for each in read)
