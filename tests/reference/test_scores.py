"""Perplexities and pseudo-log-likelihoods are those of the reference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from proteins import TINY_ESM, write_esm
from ranks import cloze_ranks, succeed
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from cloze.config import EvaluateConfig
from cloze.evaluation.evaluate import evaluate
from cloze.model.overrides import apply_overrides, parse_overrides
from cloze.utils.foreign.json_yaml import read_json
from reference.masks import Rule
from reference.runs import BLOCK, KIND, Corpus, fill, load_model, make_model
from reference.scores import perplexity, pseudo_log_likelihood

RELATIVE = 1e-6  # of sums in fp32, as in training
SENTENCES = ["The Milky Way is a spiral galaxy.", "Unbelievably antidisestablished!", "a", "Why is the sky blue?"]


def compare_perplexity(corpus: Corpus, folder: Path, architecture: str, packing: str, ranks: int = 0) -> None:
    """Evaluate with two masks for each block, by Cloze and by the reference."""
    kind = KIND.get(architecture, "bpe")
    model, (data, blocks) = (
        make_model(architecture, corpus),
        fill(corpus, kind, 15 if kind == "wordpiece" else 17, packing),
    )
    options = {"model": str(model), "data": str(data), "split": "train", "seed": 5, "mlm_probability": 0.2}
    options |= {"draws": 2, "per_device_eval_batch_size": 3, "output": str(folder / "eval.json")}
    if ranks:
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        succeed(cloze_ranks(["evaluate", *words], ranks, "ddp", folder / "log"))
        found = read_json(folder / "eval.json")
    else:
        found = evaluate(EvaluateConfig(**options, use_cpu=True))
    rule = Rule(corpus.tokenizer(kind), 5, 0.2, evaluation=True, block_size=BLOCK)
    expected = perplexity(load_model(model), blocks, rule, draws=2)
    assert found["masked_tokens"] == expected.masked_tokens
    assert found["loss"] == pytest.approx(expected.loss, rel=RELATIVE)
    # The error of a loss is a sum of squared differences, so its relative error is twice theirs.
    assert found["loss_interval"] == pytest.approx(expected.interval, rel=2 * RELATIVE)
    assert found["perplexity_interval"] == pytest.approx([math.exp(x) for x in expected.interval], rel=1e-5)
    assert found["masked_accuracy"] == pytest.approx(expected.accuracy, abs=1e-9)
    assert found["masked_accuracy_top5"] == pytest.approx(expected.accuracy_top5, abs=1e-9)


@pytest.mark.parametrize(("architecture", "packing"), [("bart", "concat"), ("electra", "best_fit")])
def test_perplexity_and_its_interval_are_those_of_the_reference(corpus, tmp_path, architecture, packing):
    compare_perplexity(corpus, tmp_path, architecture, packing)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert", "bart", "deberta-v2", "electra"])
def test_so_they_are_for_every_architecture_on_any_number_of_ranks(corpus, tmp_path, architecture, ranks):
    compare_perplexity(corpus, tmp_path, architecture, "concat", ranks)


def write_model(folder: Path) -> Path:
    """A tiny ESM, whose tokenizer is written in Python: it has no notion of words."""
    tokenizer = AutoTokenizer.from_pretrained(write_esm(folder))
    assert not tokenizer.is_fast
    config = AutoConfig.for_model(
        "esm", vocab_size=len(tokenizer), pad_token_id=1, mask_token_id=tokenizer.mask_token_id
    )
    apply_overrides(config, parse_overrides(f"{TINY_ESM},initializer_range=0.1,token_dropout=False"))
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("metric", ["pll", "pll_word_l2r"])
@pytest.mark.parametrize("architecture", ["roberta", "esm"])
def test_pseudo_log_likelihoods_are_those_of_the_reference(corpus, tmp_path, architecture: str, metric: str):
    if architecture == "esm":
        model, texts = write_model(tmp_path / "model"), ["MKTAYIQRFV", "GLSPHW", "MKTAYI"]
    else:
        model, texts = make_model(architecture, corpus), SENTENCES
    (tmp_path / "sentences.txt").write_text("\n".join(texts))
    options = {"model": str(model), "sentences": str(tmp_path / "sentences.txt"), "metric": metric}
    found = evaluate(EvaluateConfig(**options, per_device_eval_batch_size=5, use_cpu=True))
    tokenizer, reference = AutoTokenizer.from_pretrained(model), load_model(model)
    expected = [pseudo_log_likelihood(reference, tokenizer, text, metric == "pll_word_l2r") for text in texts]
    assert [one["tokens"] for one in found["sentences"]] == [tokens for _, tokens in expected]
    assert [one["pll"] for one in found["sentences"]] == pytest.approx([pll for pll, _ in expected], rel=RELATIVE)
    mean = -sum(pll for pll, _ in expected) / sum(tokens for _, tokens in expected)
    assert found["pseudo_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
