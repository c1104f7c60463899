"""The card's values for exactly the weights of its model: evaluation, metrics up to their step, checksum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloze.checkpoint.lineage import Lineage, from_mapping, read_record, scores_of
from cloze.checkpoint.run_folder import read_metrics
from cloze.errors import DataError
from cloze.evaluation.metric_table import METRICS
from cloze.export.cards.metadata import on_other_data, read_run_files
from cloze.utils import run_files
from cloze.utils.foreign.lenient_read import interval_of, is_number


def excluded_scores(model_dir: Path, run_dir: Path | None) -> str | None:
    """Return one line if the card excludes the run's eval.json because it is of other weights than the model."""
    return scores_of(read_record(model_dir), read_run_files(run_dir)[run_files.SCORES])[1]


def weights_facts(lineage: Lineage | None) -> dict[str, Any]:
    """Return the rows of the card's table of the weights; empty if they are not recorded."""
    if lineage is None:
        return {}
    return {"made of": str(lineage), "run": lineage.run, "checksum": lineage.weights}


def evaluation_facts(scores: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of the card's table of an evaluation; `data`: the manifest of the training data."""
    keys = (
        *(metric.key for metric in METRICS),
        "masked_tokens",
        "blocks",
        "split",
        "mlm_probability",
        "seed",
        "draws",
    )
    facts: dict[str, Any] = {key: scores.get(key) for key in keys}
    if on_other_data(scores, data):
        facts["data"] = f"{scores.get('data') or 'other blocks'}, not the data of this run"
    if (lineage := from_mapping(scores)) is not None:
        facts["weights"] = str(lineage)
    for key in keys:
        if (interval := interval_of(scores, key)) and facts[key] is not None:
            facts[key] = f"{facts[key]} (95 %: {interval[0]:.6g} to {interval[1]:.6g})"
    return facts


def read_lines(run_dir: Path | None, lineage: Lineage | None = None) -> list[dict[str, Any]]:
    """Return the readable lines of metrics.jsonl, up to the step of `lineage`; [] if the file is missing."""
    try:
        lines = read_metrics(run_dir) if run_dir else []
    except DataError:
        return []
    last = None if lineage is None else lineage.step
    return lines if last is None else [line for line in lines if number_in(line, "step") <= last]


def number_in(values: dict[str, Any], key: str) -> float:
    """Return a finite number of a mapping, else 0."""
    found: Any = values.get(key)
    return found if is_number(found) else 0.0
