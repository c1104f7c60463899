"""`cloze evaluate`: print what was measured."""

from __future__ import annotations

import time
from typing import Any

from cloze.config import EvaluateConfig
from cloze.evaluation.evaluate import evaluate
from cloze.evaluation.metric_table import METRICS
from cloze.utils.terminal.console import duration, say


def run(config: EvaluateConfig) -> None:
    """Evaluate, and print the numbers."""
    begin = time.monotonic()
    values = evaluate(config)
    first, *rest = lines_of(values)
    for line in (f"{first}; {duration(time.monotonic() - begin)}", *rest):
        say("evaluate", line, result=True)


def lines_of(values: dict[str, Any]) -> list[str]:
    """Return the lines that describe the values of eval.json."""
    if "pll" in values:
        return [
            f"{values['metric']} {values['pll']:.4f}, pseudo-perplexity {values['pseudo_perplexity']:.4f} over "
            f"{len(values['sentences']):,} sentences, {values['tokens']:,} tokens"
        ]
    low, high = values["perplexity_interval"]
    more = [
        metric.printed.format(values[metric.key])
        for metric in METRICS
        if metric.printed is not None and values[metric.key] is not None
    ]
    bands = "; ".join(
        f"{name} {band['loss']:.3f}, {band['masked_accuracy']:.4f}"
        for name, band in values["bands"].items()
        if band["masked_tokens"]
    )
    return [
        f"perplexity {values['perplexity']:.4f} (95 %: {low:.4f} to {high:.4f}), masked accuracy "
        f"{values['masked_accuracy']:.4f} on {values['masked_tokens']:,} masked tokens of {values['blocks']:,} blocks",
        ", ".join(more),
        f"loss and accuracy of tokens by frequency: {bands}",
    ]
