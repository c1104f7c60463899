"""Masks filled by the models of a run, before training and after it. The one part of a report that loads models.

filled = fill_prompts(runs, read_prompts("prompts.txt"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloze.checkpoint.model_path import resolve_model_path
from cloze.checkpoint.open_model import load_model, open_tokenizer
from cloze.errors import ClozeError
from cloze.evaluation.fill_mask import best_words, masked_inputs
from cloze.tools.report.gather import Run
from cloze.tools.report.scores import Answers, Filled
from cloze.utils import run_files
from cloze.utils.foreign.json_yaml import read_mapping

TOP_K = 3


def fill_prompts(runs: Sequence[Run], texts: Sequence[str]) -> list[Filled]:
    """Return the TOP_K best words for the masks of each text, by each run. Raises ConfigError for a text without a
    mask, ModelError, CheckpointError if a run has no model that can be loaded."""
    filled: list[Filled] = []
    for number, run in enumerate(runs):
        found = resolve_model_path(str(run.folder))
        tokenizer = open_tokenizer(found)
        model = load_model(found.folder, tokenizer)
        inputs = [masked_inputs(tokenizer, text) for text in texts]
        after = [_answers(model, tokenizer, one) for one in inputs]
        del model
        begun = begun_with(run, tokenizer)
        before: list[Answers | None] = [None] * len(texts)
        if begun is not None:
            first, what = begun
            before = [_answers(first, tokenizer, one) for one in inputs]
        for text, one, other in zip(texts, before, after, strict=True):
            labelled = None if one is None else (what, one)
            filled.append({"run": run.name, "number": number, "text": text, "before": labelled, "after": other})
    order = {text: number for number, text in enumerate(texts)}
    return sorted(filled, key=lambda one: order[one["text"]])


def begun_with(run: Run, tokenizer: Any) -> tuple[Any, str] | None:
    """Return the model before training, and what it is: the weights that the run began with, where they are a folder
    of this machine, else its first checkpoint; None if neither is there, whole, and earlier than the model."""
    start = read_mapping(run.folder / run_files.CONFIG).get("model_name_or_path")
    if isinstance(start, str) and (Path(start) / "config.json").is_file():
        return load_model(resolve_model_path(start).folder, tokenizer), "the weights it began with"
    if len(run.checkpoints) < 2:
        return None
    step = run.checkpoints[0].step
    try:
        checkpoint = resolve_model_path(str(run.folder / f"checkpoint-{step}")).folder
        return load_model(checkpoint, tokenizer), f"after {step:,} steps"
    except ClozeError:  # damaged: not the requested weights
        return None


def _answers(model: Any, tokenizer: Any, text: Any) -> Answers:
    """Return the best words of a text's mask; of several masks the best word of each, in their order."""
    inputs, rows = text
    found = best_words(model, tokenizer, inputs, rows, TOP_K)
    return found[0] if len(found) == 1 else [words[0] for words in found]
