"""Measure whether one model is better than another, on the same masks of the same blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

from cloze.checkpoint.lineage import Lineage
from cloze.checkpoint.run_data import choose_data
from cloze.config import CompareConfig
from cloze.data.prepared.verified import verify_for_use
from cloze.distributed.world import RunShape, start
from cloze.evaluation.evaluate import about_data, about_masks
from cloze.evaluation.evaluator import masks_of, open_subject
from cloze.evaluation.intervals import interval, p_value, ratio_and_error
from cloze.evaluation.perplexity import LOSS, MASKED, Scores, perplexity
from cloze.utils.atomic_files import write_json
from cloze.utils.output_file import check_output_file
from cloze.utils.terminal.console import say


class Comparison(NamedTuple):
    """What `cloze compare` measured: see `paired`; and the weights of both models, each None if unknown."""

    values: dict[str, Any]
    lineages: list[Lineage | None]


def compare(config: CompareConfig) -> Comparison:
    """Score both models, write --output, and return the paired difference. Raises ConfigError, ModelError."""
    masks = masks_of(config)
    output = check_output_file(config.output) if config.output else None
    prepared = choose_data(config.data, [config.model, config.other])
    prepared.blocks(config.split)
    verify_for_use(prepared, [config.split], config)
    accelerator = start(RunShape(use_cpu=config.use_cpu, precision="no"))
    scores: list[Scores] = []
    lineages: list[Lineage | None] = []
    for name in (config.model, config.other):
        subject = open_subject(name, prepared, config.split, accelerator, config.trust_remote_code)
        scores.append(subject.score_split(prepared, config.split, masks))
        lineages.append(subject.lineage)
        del subject
    values = paired(*scores)
    if output is not None and accelerator.is_main_process:
        about = {**about_masks(masks), **about_data(str(prepared.folder), config.split, prepared)}
        of = {f"lineage_{key}": one and one.as_mapping() for key, one in zip("ab", lineages, strict=True)}
        write_json(output, {"a": config.model, "b": config.other, **of, **values, **about})
        say("compare", f"written to {config.output}")
    return Comparison(values, lineages)


def paired(one: Scores, other: Scores) -> dict[str, Any]:
    """Return the difference of two models' losses on the same masks, b - a, with its 95 % interval and p-value.

    Both models score the same blocks, so the difficulty of a block cancels and does not widen the interval.
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
