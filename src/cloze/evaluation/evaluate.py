"""Measure a model: perplexity on fixed masks, or pseudo-log-likelihood of sentences.

    evaluate(EvaluateConfig(model="runs/mine", data="prepared/mine"))["perplexity"]

Under `accelerate launch` the blocks or sentences are shared between the processes; the result is the same.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cloze.checkpoint.lineage import KEY as LINEAGE
from cloze.checkpoint.lineage import describe as describe_lineage
from cloze.checkpoint.run_data import choose_data
from cloze.config import EvaluateConfig
from cloze.data.prepared.shards import Prepared
from cloze.data.prepared.verified import verify_for_use
from cloze.distributed.collectives import run_on_main_and_broadcast
from cloze.distributed.world import RunShape, start
from cloze.errors import ConfigError, DataError
from cloze.evaluation.evaluator import Masks, masks_of, open_subject, split_sentences
from cloze.evaluation.metric_table import METRICS
from cloze.evaluation.perplexity import Scores
from cloze.evaluation.pll import pseudo_perplexity
from cloze.evaluation.vocabulary import BANDS
from cloze.utils import run_files
from cloze.utils.atomic_files import write_json
from cloze.utils.foreign.text_lines import read_lines
from cloze.utils.output_file import check_output_file
from cloze.utils.terminal.console import is_main, say

HINT = "put the result elsewhere with --output FILE"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, write eval.json (see `output_path`), and return its values, on every rank.

    Raises ConfigError, DataError, ModelError or CheckpointError.
    """
    check(config)
    if config.output and is_main():
        check_output_file(config.output, HINT)
    otherwise = "; for a file of sentences use --metric pll --sentences FILE"
    prepared = choose_data(config.data, [config.model], otherwise) if config.sentences is None else None
    if prepared is not None:
        prepared.blocks(config.split)
        verify_for_use(prepared, [config.split], config)
    lines = None if config.sentences is None else read_sentences(config.sentences)
    accelerator = start(RunShape(use_cpu=config.use_cpu, precision="no"))
    subject = open_subject(config.model, prepared, config.split, accelerator, config.trust_remote_code)
    output = output_path(config, subject.run_dir)
    if output is not None:
        run_on_main_and_broadcast(lambda: str(check_output_file(output, HINT)))
    say("evaluate", f"{subject.name}: {describe_lineage(subject.lineage)}")
    if config.metric == "perplexity":
        assert prepared is not None
        masks = masks_of(config)
        scores = subject.score_split(prepared, config.split, masks)
        values = {
            **describe(scores),
            **about_masks(masks),
            **about_data(str(prepared.folder), config.split, prepared),
        }
    else:
        if lines is not None:
            sentences = subject.read_sentences(lines)
        else:
            assert prepared is not None
            sentences = split_sentences(prepared, config.split, subject.tokenizer)
        word_l2r = config.metric == "pll_word_l2r"
        found = subject.score_sentences(sentences, config.per_device_eval_batch_size, word_l2r)
        values = {
            "metric": config.metric,
            "pll": math.fsum(one.pll for one in found),
            "pseudo_perplexity": pseudo_perplexity(found),
            "tokens": sum(one.num_tokens for one in found),
            "sentences": [{"pll": one.pll, "tokens": one.num_tokens} for one in found],
        }
    values[LINEAGE] = None if subject.lineage is None else subject.lineage.as_mapping()
    if output is not None and accelerator.is_main_process:
        write_json(check_output_file(output, HINT), values)
        say("evaluate", f"written to {output}", result=output)
    return values


def check(config: EvaluateConfig) -> None:
    """Raise ConfigError for values that cannot be used."""
    if config.metric == "perplexity" and config.sentences is not None:
        raise ConfigError(
            "perplexity is measured on prepared blocks",
            where="--data",
            hint="give --data FOLDER; for a file of sentences use --metric pll",
        )
    if config.data is not None and config.sentences is not None:
        raise ConfigError("give one of --data and --sentences", where=f"--metric {config.metric}")


def read_sentences(path: str) -> list[str]:
    """Return the sentences of a file, one a line, empty lines left out. Raises DataError."""
    lines = read_lines(path)
    if not lines:
        raise DataError("holds no sentence", where=path, hint="one on each line")
    return lines


def describe(scores: Scores) -> dict[str, Any]:
    """Return the numbers of eval.json."""
    values: dict[str, Any] = {}
    for metric in METRICS:
        values[metric.key] = getattr(scores, metric.key)
        if metric.interval:
            values[f"{metric.key}_interval"] = list(getattr(scores, f"{metric.key}_interval"))
    return {
        **values,
        "masked_tokens": scores.masked_tokens,
        "blocks": scores.blocks,
        "bands": {
            name: {
                "loss": loss / count if count else None,
                "masked_accuracy": right / count if count else None,
                "masked_tokens": int(count),
            }
            for name, (loss, count, right) in zip(BANDS, scores.bands.tolist(), strict=True)
        },
    }


def about_masks(masks: Masks) -> dict[str, Any]:
    """Return how blocks were masked."""
    return {"mlm_probability": masks.mlm_probability, "seed": masks.seed, "draws": masks.draws}


def about_data(folder: str | None, split: str, prepared: Prepared) -> dict[str, Any]:
    """Return the description of the scored blocks."""
    return {
        "split": split,
        "block_size": prepared.block_size,
        "data": Path(folder or "").name,
        "data_checksum": prepared.manifest["checksum"],
    }


def output_path(config: EvaluateConfig, run_dir: Path | None) -> Path | None:
    """Return --output, else eval.json in the run's folder for the perplexity of its model, else None."""
    if config.output:
        return Path(config.output)
    if config.metric != "perplexity" or run_dir is None or (Path(config.model) / run_files.CHECKPOINT).is_file():
        return None
    return run_dir / run_files.SCORES
