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
import yaml
from corpus import TINY_MODEL
from ranks import cloze_ranks, succeed
from transformers import AutoModelForMaskedLM

import cloze
from cloze.config import ConsolidateConfig
from cloze.data.batches.masking import Masking
from cloze.data.prepared.shards import open_prepared
from cloze.data.tokenizers.load import load_tokenizer
from cloze.data.tokenizers.token_ids import vocabulary_size

METRICS = Path(cloze.__file__).parent / "evaluation" / "metrics"


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A consolidated run of ten steps, evaluated during training."""
    from cloze.cli.commands import consolidate

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
    in_5 = (logits.topk(5).indices == torch.from_numpy(labels)[..., None]).any(-1)[rows].double().mean().item()
    assert in_5 > right
    found = scores(run, prepared, tmp_path, 1, 8)
    assert math.isclose(found["perplexity"], loss.exp().item(), rel_tol=1e-6)
    assert math.isclose(found["masked_accuracy"], right, rel_tol=1e-9)
    assert math.isclose(found["masked_accuracy_top5"], in_5, rel_tol=1e-9)


def test_other_seeds_draw_other_masks(run: Path, prepared: Path, tmp_path: Path):
    one, other = (scores(run, prepared, tmp_path, 1, 8, "--seed", seed) for seed in ("42", "43"))
    assert one["masked_tokens"] != other["masked_tokens"]


def test_all_numbers_are_the_same_on_any_ranks(run: Path, prepared: Path, tmp_path: Path):
    one = scores(run, prepared, tmp_path, 1, 8, "--draws", "3")
    other = scores(run, prepared, tmp_path, 2, 5, "--draws", "3")
    assert one["draws"] == 3
    low, high = one["perplexity_interval"]
    assert low < one["perplexity"] < high
    assert one["masked_accuracy"] <= one["masked_accuracy_top5"] <= 1
    assert sum(band["masked_tokens"] for band in one["bands"].values()) == one["masked_tokens"]
    right = sum(band["masked_accuracy"] * band["masked_tokens"] for band in one["bands"].values() if band["loss"])
    assert right == pytest.approx(one["masked_accuracy"] * one["masked_tokens"], rel=1e-9)
    for key in ("perplexity_interval", "loss_interval", "bits_per_byte", "masked_accuracy_top5"):
        np.testing.assert_allclose(other[key], one[key], rtol=1e-6)
    for name, band in one["bands"].items():
        assert other["bands"][name]["masked_tokens"] == band["masked_tokens"]
        assert other["bands"][name]["masked_accuracy"] == band["masked_accuracy"]


def test_more_draws_make_the_number_surer_and_begin_with_the_first(run: Path, prepared: Path, tmp_path: Path):
    one, four = (scores(run, prepared, tmp_path, 1, 16, "--draws", draws) for draws in ("1", "4"))
    assert 3.5 * one["masked_tokens"] < four["masked_tokens"] < 4.5 * one["masked_tokens"]
    widths = [found["loss_interval"][1] - found["loss_interval"][0] for found in (one, four)]
    assert widths[1] < widths[0]


def test_bits_per_byte_are_the_loss_over_the_bytes_of_the_masked_text(run: Path, prepared: Path, tmp_path: Path):
    data = open_prepared(prepared)
    blocks, tokenizer = data.blocks("validation"), load_tokenizer(str(data.tokenizer_dir))
    indices = np.arange(len(blocks))
    _, labels = Masking.from_manifest(data.manifest, seed=42).for_evaluation().apply(blocks.read(indices), indices)
    masked = labels[labels != -100]
    num_bytes = sum(len(name) for name in tokenizer.convert_ids_to_tokens(masked.tolist()))  # byte-level: one each
    found = scores(run, prepared, tmp_path, 1, 8)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * len(masked) / math.log(2) / num_bytes, rel=1e-6)


def test_a_checkpoint_is_measured_as_the_model_made_of_it(run: Path, prepared: Path, tmp_path: Path):
    whole = scores(run, prepared, tmp_path, 1, 8)
    assert scores(run / "checkpoint-10", prepared, tmp_path, 1, 8)["perplexity"] == whole["perplexity"]


def compared(one: Path, other: Path, prepared: Path, tmp_path: Path, *more: str, code: int = 0) -> tuple[dict, str]:
    output = tmp_path / "compared.json"
    argv = ["compare", str(one), str(other), "--data", str(prepared), "--output", str(output), *more]
    (outcome,) = cloze_ranks(argv, 1, "single", tmp_path / "log")
    assert outcome.code == code, outcome.output
    return json.loads(output.read_text()) if code == 0 else {}, outcome.output


def test_two_models_are_compared_in_pairs(run: Path, prepared: Path, tmp_path: Path):
    """A checkpoint and the same one again, and with weights disturbed a little: found, for pairs are sure of it."""
    same, text = compared(run, run / "checkpoint-10", prepared, tmp_path)
    assert (same["loss_difference"], same["p_value"]) == (0.0, 1.0)
    assert "no significant difference" in text
    worse = tmp_path / "worse"
    model = AutoModelForMaskedLM.from_pretrained(run / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    model.save_pretrained(worse)
    load_tokenizer(str(run / "model")).save_pretrained(worse)
    found, text = compared(run, worse, prepared, tmp_path, "--draws", "2")
    low, high = found["loss_difference_interval"]
    assert low < found["loss_difference"] < high
    assert found["perplexity_b"] / found["perplexity_a"] == pytest.approx(found["perplexity_ratio"], rel=1e-9)
    assert ("is better" in text) == (found["p_value"] < 0.05)
    alone = scores(run, prepared, tmp_path, 1, 8, "--draws", "2")
    assert high - low < 0.5 * (alone["loss_interval"][1] - alone["loss_interval"][0])


def test_models_of_other_tokenizers_are_not_compared(run: Path, prepared: Path, tmp_path: Path):
    other = tmp_path / "other"
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(run / "model"), load_tokenizer(str(run / "model"))
    tokenizer.add_tokens(["galaxies"])
    model.resize_token_embeddings(vocabulary_size(tokenizer))
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    _, text = compared(run, other, prepared, tmp_path, code=2)
    assert "tokenizer is not the one the data was prepared with" in text
    assert "compare bits per byte" in text


def test_sentences_and_blocks_have_pseudo_likelihoods_on_any_ranks(run: Path, prepared: Path, tmp_path: Path):
    file = tmp_path / "sentences.txt"
    file.write_text("The Milky Way is a spiral galaxy.\n\nStars and planets\nWhy is the sky blue?\n")
    found = []
    for world_size in (1, 2):
        output = tmp_path / f"{world_size}.json"
        argv = ["evaluate", str(run), "--metric", "pll_word_l2r", "--sentences", str(file), "--output", str(output)]
        engine = "single" if world_size == 1 else "ddp"
        succeed(cloze_ranks(argv, world_size, engine, tmp_path / "log"))
        found.append(json.loads(output.read_text()))
    assert len(found[0]["sentences"]) == 3
    assert found[0]["pll"] == pytest.approx(found[1]["pll"], rel=1e-6)
    output = tmp_path / "blocks.json"
    argv = ["evaluate", str(run), "--metric", "pll", "--data", str(prepared), "--output", str(output)]
    succeed(cloze_ranks([*argv, "--per_device_eval_batch_size", "64"], 1, "single", tmp_path / "log"))
    blocks = json.loads(output.read_text())
    data = open_prepared(prepared)
    ids = data.blocks("validation").read(np.arange(len(data.blocks("validation"))))
    scored = ~np.isin(ids, data.manifest["tokenizer"]["special_token_ids"])
    assert not scored.all()
    assert [one["tokens"] for one in blocks["sentences"]] == scored.sum(axis=1).tolist()
    assert math.exp(-blocks["pll"] / blocks["tokens"]) == pytest.approx(blocks["pseudo_perplexity"], rel=1e-9)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--metric", "pll", "--data", "x", "--sentences", "y"], "give one of --data and --sentences"),
        (["--sentences", "x.txt"], "perplexity is measured on prepared blocks"),
        (["--metric", "pll", "--sentences", "none.txt"], "none.txt: cannot be read"),
        (["--data", "x", "--draws", "0"], "--draws: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(run: Path, tmp_path: Path, flags: list[str], told: str):
    (outcome,) = cloze_ranks(["evaluate", str(run), *flags], 1, "single", tmp_path / "log")
    assert outcome.code == 2
    assert told in outcome.output
    assert "Traceback" not in outcome.output


def test_the_metric_refuses_what_has_no_answer():
    metric = evaluate.load(str(METRICS / "masked_perplexity"))
    result = metric.compute(predictions=[1.0, 5.0], references=[1, 3])
    assert result == {"loss": 1.5, "perplexity": math.exp(1.5), "masked_tokens": 4}
    with pytest.raises(ValueError, match="masked"):
        metric.compute(predictions=[0.0], references=[0])


@pytest.mark.parametrize("name", sorted(path.name for path in METRICS.iterdir() if (path / "app.py").is_file()))
def test_metrics_are_modules_of_evaluate_whose_examples_are_true(run: Path, name: str):
    """As folders that make a Space: the module with its descriptions, an app, what it needs, a card."""
    folder = METRICS / name
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = {"model": str(run / "model")}
    example = doctest.DocTestParser().get_doctest(module._KWARGS_DESCRIPTION, given, name, None, 0)
    assert len(example.examples) >= 4
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.summarize(verbose=False).failed == 0
    _, metadata, _ = (folder / "README.md").read_text().split("---", 2)
    assert yaml.safe_load(metadata)["sdk"] == "gradio"
    assert f'"{name}.py"' in (folder / "app.py").read_text()
    assert "evaluate" in (folder / "requirements.txt").read_text().split()
