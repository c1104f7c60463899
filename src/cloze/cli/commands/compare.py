"""`cloze compare A B`: print which model is better."""

from __future__ import annotations

import math
import time

from cloze.checkpoint.lineage import describe, same_weights
from cloze.config import CompareConfig
from cloze.evaluation.compare import compare
from cloze.utils.terminal.console import duration, say, warn


def run(config: CompareConfig) -> None:
    """Compare, and print both perplexities and the difference."""
    begin = time.monotonic()
    values, lineages = compare(config)
    if same_weights(*lineages):
        warn("a and b have the same weights")
    low, high = values["loss_difference_interval"]
    say("compare", f"a: {config.model} ({describe(lineages[0])}): perplexity {values['perplexity_a']:.4f}")
    say("compare", f"b: {config.other} ({describe(lineages[1])}): perplexity {values['perplexity_b']:.4f}")
    verdict = verdict_of(values["loss_difference"], low, high)
    say(
        "compare",
        f"loss of b - a: {values['loss_difference']:+.5f} (95 %: {low:+.5f} to {high:+.5f}), "
        f"p {values['p_value']:.2g}: {verdict}; {values['masked_tokens']:,} masked tokens of {values['blocks']:,} "
        f"blocks; {duration(time.monotonic() - begin)}",
    )


def verdict_of(difference: float, low: float, high: float) -> str:
    """Return which model is better, from the loss of b - a and its 95 % interval."""
    if not all(map(math.isfinite, (difference, low, high))):
        return "no verdict: a loss is not finite, or a single block gives no interval"
    if low <= 0 <= high:
        return "no significant difference"
    return f"{'a' if low > 0 else 'b'} is better"
