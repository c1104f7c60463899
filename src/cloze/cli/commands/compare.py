"""`cloze compare A B --data PREPARED`: is one model better than the other, on the same masks of the same blocks?"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from cloze.checkpoint.lineage import Lineage, describe, same_weights
from cloze.cli.commands.evaluate import about_data, about_masks
from cloze.config import CompareConfig
from cloze.data.prepared.shards import open_prepared
from cloze.data.prepared.verified import verify_for_use
from cloze.distributed.world import RunShape, start
from cloze.evaluation.evaluator import masks_of, open_subject
from cloze.evaluation.intervals import interval, p_value, ratio_and_error
from cloze.evaluation.perplexity import LOSS, MASKED, Scores, perplexity
from cloze.utils.atomic_files import write_json
from cloze.utils.output_file import check_output_file
from cloze.utils.terminal.console import duration, say, warn


def run(config: CompareConfig) -> None:
    """Score both models, and print the paired difference. Raises ConfigError, ModelError."""
    masks = masks_of(config)
    output = check_output_file(config.output) if config.output else None
    prepared = open_prepared(config.data)
    prepared.blocks(config.split)
    verify_for_use(prepared, [config.split], config)
    accelerator = start(RunShape(use_cpu=config.use_cpu, precision="no"))
    begin = time.monotonic()
    scores, lineages = [], []
    for name in (config.model, config.other):
        subject = open_subject(name, prepared, config.split, accelerator, config.trust_remote_code)
        scores.append(subject.score_split(prepared, config.split, masks))
        lineages.append(subject.lineage)
        del subject
    values = paired(*scores)
    if accelerator.is_main_process:
        tell(config, values, lineages, duration(time.monotonic() - begin))
        if output is not None:
            about = {**about_masks(masks), **about_data(config.data, config.split, prepared)}
            of = {f"lineage_{key}": one and one.as_mapping() for key, one in zip("ab", lineages, strict=True)}
            write_json(output, {"a": config.model, "b": config.other, **of, **values, **about})
            say("compare", f"written to {config.output}")


def paired(one: Scores, other: Scores) -> dict[str, Any]:
    """The difference of two models' losses on the same masks, b - a, with its 95 % interval and p-value.

    Blocks are pairs: what is hard about a block is hard for both, and is not counted as chance.
    """
    difference, error = ratio_and_error(other.table[:, LOSS] - one.table[:, LOSS], one.table[:, MASKED])
    low, high = interval(difference, error)
    return {
        "perplexity_a": one.perplexity,
        "perplexity_b": other.perplexity,
        "loss_difference": difference,
        "loss_difference_interval": [low, high],
        "perplexity_ratio": perplexity(difference),
        "p_value": p_value(difference, error),
        "masked_tokens": one.masked_tokens,
        "blocks": one.blocks,
    }


def tell(config: CompareConfig, values: dict[str, Any], lineages: Sequence[Lineage | None], took: str) -> None:
    """Print both perplexities and the difference."""
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
        f"blocks; {took}",
    )


def verdict_of(difference: float, low: float, high: float) -> str:
    """Return which model is better, from the loss of b - a and its 95 % interval."""
    if not all(map(math.isfinite, (difference, low, high))):
        return "nothing can be told: a loss is not finite, or one block gives no interval"
    if low <= 0 <= high:
        return "no difference can be told"
    return f"{'a' if low > 0 else 'b'} is better"
