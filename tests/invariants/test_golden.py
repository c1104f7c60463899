"""Curves that were computed once and committed: what a change of the code does to a run shows in their diff.

    python tests/invariants/test_golden.py        # computes them anew; then look at `git diff tests/invariants/golden`

Data, order, masks, initial weights, schedule, loss and optimizer all have a part in them. Processors and versions of
libraries round differently, which grows from step to step; TOLERANCE allows for that, and for nothing else: another
mask or another order changes the loss of a step by some percent.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("", "helpers")]

import conftest  # noqa: F401  (its environment)
from ranks import cloze_ranks, succeed

FOLDER = Path(__file__).parent / "golden"
TOLERANCE = 1e-3  # relative, of loss and gradient norm
STEPS = 40
_SMALL = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
_NO_DROPOUT = {
    "bert": ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0",
    "roberta": ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0",
    "modernbert": ",embedding_dropout=0.0,attention_dropout=0.0,mlp_dropout=0.0",
}
# name -> engine, ranks, flags: three architectures, and between them three schedules, splits and masking rules
RECIPES = {
    "bert": ("zero1", 2, ["--per_device_train_batch_size", "4", "--lr_scheduler_type", "cosine"]),
    "roberta": ("zero2", 2, ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]),
    "modernbert": ("ddp", 2, ["--per_device_train_batch_size", "4", "--mlm_probability", "0.3",
                              "--warmup_steps", "0.1", "--lr_scheduler_type", "constant_with_warmup"]),
}  # fmt: skip
COMMON = ["--max_steps", str(STEPS), "--logging_steps", "1", "--save_strategy", "no", "--learning_rate", "1e-3"]
COMMON += ["--weight_decay", "0.1", "--seed", "11", "--eval_strategy", "steps", "--eval_steps", "20"]
KEYS = ("step", "samples_seen", "learning_rate", "loss", "grad_norm", "eval_perplexity")


def compute(prepared: Path, folder: Path, name: str) -> list[dict[str, float]]:
    """Run a recipe and give what of its metrics is compared."""
    engine, world_size, flags = RECIPES[name]
    model = ["--model_type", name, "--config_overrides", _SMALL + _NO_DROPOUT[name]]
    where = ["--dataset_name", str(prepared), "--output_dir", str(folder / name)]
    succeed(cloze_ranks(["train", *model, *COMMON, *flags, *where], world_size, engine, folder / "log"))
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in KEYS if key in line} for line in lines]


def read(name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def compare(found: list[dict[str, float]], golden: list[dict[str, float]]) -> float:
    """The largest relative difference; what is exact must be the same."""
    assert [line.keys() for line in found] == [line.keys() for line in golden]
    worst = 0.0
    for here, there in zip(found, golden, strict=True):
        for key in here:
            if key in ("step", "samples_seen"):
                assert here[key] == there[key]
            else:
                worst = max(worst, abs(here[key] / there[key] - 1) if there[key] else abs(here[key]))
    return worst


@pytest.mark.parametrize("name", RECIPES)
def test_the_curve_is_the_committed_one(prepared: Path, tmp_path: Path, name: str):
    found, golden = compute(prepared, tmp_path, name), read(name)
    assert len(golden) == STEPS + 2
    assert compare(found, golden) < TOLERANCE


def test_the_tolerance_would_notice_another_mask_or_order():
    """Two steps of one curve differ by far more than is allowed for."""
    for name in RECIPES:
        losses = np.array([line["loss"] for line in read(name) if "loss" in line])
        assert losses[-5:].mean() < losses[:5].mean() - 0.3  # it learns
        assert np.median(np.abs(np.diff(losses) / losses[1:])) > 5 * TOLERANCE


if __name__ == "__main__":
    from corpus import make_prepared

    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        data = make_prepared(Path(scratch) / "prepared")
        for each in RECIPES:
            curve = compute(data, Path(scratch), each)
            (FOLDER / f"{each}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
            print(f"{each}: loss {curve[0]['loss']:.4f} -> {curve[-1].get('loss', curve[-2].get('loss'))}")
