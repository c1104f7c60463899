"""Perplexity is one number: any number of processes, any batch size, in training or afterwards."""

from __future__ import annotations

import doctest
import importlib.util
import json
import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from corpus import TINY_MODEL
from ranks import cloze_ranks, succeed
from transformers import AutoModelForMaskedLM

import cloze
from cloze.config import ConsolidateConfig
from cloze.data.masking import Masking
from cloze.data.shards import open_prepared

METRIC = Path(cloze.__file__).parent / "metrics" / "masked_perplexity"


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A consolidated run of ten steps, evaluated during training."""
    from cloze.commands import consolidate

    folder = tmp_path_factory.mktemp("evaluate")
    flags = [
        *TINY_MODEL,
        "--max_steps",
        "10",
        "--learning_rate",
        "1e-2",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "5",
    ]
    flags += ["--dataset_name", str(prepared), "--output_dir", str(folder / "run")]
    succeed(cloze_ranks(["train", *flags], 2, "zero1", folder / "log"))
    consolidate.run(ConsolidateConfig(checkpoint=str(folder / "run")))
    return folder / "run"


def scores(run: Path, prepared: Path, tmp_path: Path, world_size: int, batch: int, *more: str) -> dict:
    output = tmp_path / f"{world_size}-{batch}.json"
    argv = ["evaluate", str(run), "--data", str(prepared), "--per_device_eval_batch_size", str(batch), *more]
    engine = "single" if world_size == 1 else "ddp"
    succeed(cloze_ranks([*argv, "--output", str(output)], world_size, engine, tmp_path / "log"))
    return json.loads(output.read_text())


def test_ranks_and_batch_size_do_not_change_the_result(run: Path, prepared: Path, tmp_path: Path):
    one = scores(run, prepared, tmp_path, 1, 8)
    assert one["masked_tokens"] > 200
    for world_size, batch in ((1, 1), (1, 64), (2, 8), (3, 5)):
        other = scores(run, prepared, tmp_path, world_size, batch)
        assert math.isclose(other["perplexity"], one["perplexity"], rel_tol=1e-6)
        assert (other["masked_tokens"], other["masked_accuracy"]) == (one["masked_tokens"], one["masked_accuracy"])


def test_it_is_the_number_that_training_reported(run: Path, prepared: Path, tmp_path: Path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval_perplexity" in line][-1]
    assert last["step"] == 10
    after = scores(run, prepared, tmp_path, 1, 8)
    assert math.isclose(after["perplexity"], last["eval_perplexity"], rel_tol=1e-6)
    assert after["masked_accuracy"] == last["eval_masked_accuracy"]


def test_it_is_what_a_direct_computation_gives(run: Path, prepared: Path, tmp_path: Path):
    data = open_prepared(prepared)
    blocks = data.blocks("validation")
    indices = np.arange(len(blocks))
    ids, labels = Masking.from_manifest(data.manifest, seed=42).for_evaluation().apply(blocks.read(indices), indices)
    model = AutoModelForMaskedLM.from_pretrained(run / "model").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)).logits.double()
    loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten())
    rows = torch.from_numpy(labels) != -100
    right = (logits.argmax(-1) == torch.from_numpy(labels))[rows].double().mean().item()
    found = scores(run, prepared, tmp_path, 1, 8)
    assert math.isclose(found["perplexity"], loss.exp().item(), rel_tol=1e-6)
    assert math.isclose(found["masked_accuracy"], right, rel_tol=1e-9)


def test_other_seeds_draw_other_masks(run: Path, prepared: Path, tmp_path: Path):
    one, other = (scores(run, prepared, tmp_path, 1, 8, "--seed", seed) for seed in ("42", "43"))
    assert one["masked_tokens"] != other["masked_tokens"]


def test_the_metric_is_a_module_of_evaluate_and_its_example_is_true():
    metric = evaluate.load(str(METRIC))
    result = metric.compute(predictions=[1.0, 5.0], references=[1, 3])
    assert result == {"loss": 1.5, "perplexity": math.exp(1.5), "masked_tokens": 4}
    with pytest.raises(ValueError, match="masked"):
        metric.compute(predictions=[0.0], references=[0])
    spec = importlib.util.spec_from_file_location("masked_perplexity", METRIC / "masked_perplexity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    example = doctest.DocTestParser().get_doctest(module._KWARGS_DESCRIPTION, {}, "metric", None, 0)
    assert len(example.examples) == 4
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.summarize(verbose=False).failed == 0
