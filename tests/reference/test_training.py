"""Runs of Cloze are those of the reference, step by step: samples, masks, loss, gradient norm, weights.

Tolerances: Cloze computes in fp32, whose rounding error is u = 6e-8, the reference in fp64. A loss or norm is the sum
of many terms whose errors are a few u each and partly cancel: 1e-6 of it is room for 16 u. A weight is rounded twice
in each step, so after 8 steps by at most 16 u of its size, which is near 1 for norms: 2e-6 doubles that for errors of
the gradient. AdamW divides these by the root of v plus `adam_epsilon`: with 1e-3 an error of 1e-8 becomes 1e-5 of a
learning rate. With the default 1e-8 it becomes 1e-2 of a learning rate, 1e-4, for gradients of 1e-6, and a gradient
that is 0 but for rounding becomes a step of the whole learning rate. Biases of attention's keys have such gradients:
what is added to all keys changes no attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recording import digest, recorded_steps

from cloze.config import TrainConfig
from cloze.errors import ConfigError
from cloze.training.loss import masked_loss_sum
from cloze.training.optim.lr_schedule import learning_rate_schedule
from reference.masks import IGNORED, Rule
from reference.order import batch_size
from reference.runs import (
    BLOCK,
    KIND,
    Corpus,
    Split,
    fill,
    lines,
    load_model,
    make_model,
    stored,
    train,
)
from reference.training import Options, factor, steps_of
from reference.training import train as reference_train

OF_SUMS, OF_WEIGHTS, OF_WEIGHTS_BY_DEFAULT = 1e-6, 2e-6, 1e-4
SEED, GLOBAL_BATCH = 3, 8
FLAGS = {"seed": SEED, "learning_rate": 1e-2, "weight_decay": 0.1, "adam_epsilon": 1e-3, "max_steps": 6}
SINGLE, ZERO2, SPREAD = Split("single", 1, 2), Split("zero2", 2, 4), Split("zero2", 3, 3)  # of 9 places one is empty


@dataclass(frozen=True)
class Case:
    """A run: its model, its corpus of so many blocks, its flags, and the splits that compute it in turn."""

    architecture: str
    num_blocks: int
    flags: dict[str, Any] = field(default_factory=dict)
    splits: tuple[Split, ...] = (SINGLE,)
    packing: str = "concat"


WSD = "warmup_stable_decay"
CASES = [
    Case("bert", 15, {"mask_unit": "word", "warmup_steps": 1}),
    Case("roberta", 16, {"layerwise_lr_decay": 0.8, "lr_scheduler_type": "cosine", "adam_epsilon": 1e-8}, (ZERO2,)),
    Case(
        "modernbert",
        17,
        {"mask_unit": "span", "batch_size_warmup_start": 2, "batch_size_warmup_steps": 3, "ema_decay": 0.6}
        | {"lr_scheduler_type": WSD, "lr_scheduler_kwargs": {"num_decay_steps": 0.5, "decay_type": "1-sqrt"}},
        (Split("ddp", 2, 2),),
    ),
    Case(
        "bart",
        17,
        {"mlm_probability": 0.3, "mlm_probability_end": 0.1, "ema_decay": 0.9, "warmup_steps": 0.3},
        (SINGLE, Split("single", 1, 8)),
    ),
    Case(
        "deberta-v2",
        16,
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2, "adam_beta1": 0.8, "adam_beta2": 0.95}
        | {"max_grad_norm": 0.0},
        (Split("ddp", 3, 3),),
    ),
    Case(
        "electra",
        15,
        {"num_train_epochs": 2.29, "max_steps": -1, "lr_scheduler_type": "polynomial", "max_grad_norm": 0.5},
        (Split("single", 1, 8),),
        "best_fit",
    ),
]
ENGINES = [
    (Split("single", 1, 8),),
    (Split("ddp", 2, 2), Split("zero3", 2, 4)),
    (SPREAD, SINGLE),
    (Split("fsdp2", 2, 2), SPREAD),
]


def compare(case: Case, corpus: Corpus, folder: Path) -> None:
    """Run Cloze and the reference; fail where they differ."""
    kind = KIND.get(case.architecture, "bpe")
    data, blocks = fill(corpus, kind, case.num_blocks, case.packing)
    model, run = make_model(case.architecture, corpus), folder / "run"
    flags = {**FLAGS, "global_batch_size": GLOBAL_BATCH, **case.flags}
    for number, split in enumerate(case.splits, 1):
        train(model, data, run, split, flags, 3 if number < len(case.splits) else None)
    options = options_of(flags, len(blocks))
    unit, rates = flags.get("mask_unit", "token"), (flags.get("mlm_probability", 0.15), 0.8, 0.1)
    end = flags.get("mlm_probability_end")
    rule = Rule(corpus.tokenizer(kind), SEED, *rates, unit, end, total_samples=options.total_samples, block_size=BLOCK)
    seen = recorded_steps(folder / "run-seen")
    steps = list(reference_train(load_model(model), blocks, rule, options))
    for number, (step, line) in enumerate(zip(steps, lines(run), strict=True)):
        given = [digest(np.array(i), np.array(t)) for i, t in zip(step.input_ids, step.labels, strict=True)]
        assert {s: seen[number][s] for s in step.samples} == dict(zip(step.samples, given, strict=True)), number
        assert line["learning_rate"] == pytest.approx(step.learning_rate, rel=1e-12, abs=1e-17)
        assert line["loss"] == pytest.approx(step.loss, rel=OF_SUMS), f"loss of step {number}"
        assert line["grad_norm"] == pytest.approx(step.grad_norm, rel=OF_SUMS), f"norm of step {number}"
    checkpoint = run / f"checkpoint-{len(steps)}"
    assert_same(dict(stored(checkpoint, "weight")), steps[-1].weights, options)
    if options.ema_decay is not None:
        assert_same(dict(stored(checkpoint, "ema")), steps[-1].averages, options)


def options_of(flags: dict[str, Any], num_blocks: int) -> Options:
    """Return what the flags mean for a corpus of so many blocks."""
    growth = flags.get("batch_size_warmup_start", 1), flags.get("batch_size_warmup_steps", 0)
    steps, samples = flags["max_steps"], 0
    if steps < 0:
        samples, steps, seen = round(flags["num_train_epochs"] * num_blocks), 0, 0
        while seen < samples:
            seen, steps = seen + batch_size(steps, GLOBAL_BATCH, *growth), steps + 1
    else:
        samples = sum(batch_size(step, GLOBAL_BATCH, *growth) for step in range(steps))
    known = {name: value for name, value in flags.items() if name in Options.__dataclass_fields__}
    return Options(global_batch=GLOBAL_BATCH, total_samples=samples, total_steps=steps, **known)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], options: Options) -> None:
    """Every parameter is there, and is near enough."""
    assert found.keys() == expected.keys()
    by_default = options.adam_epsilon == 1e-8
    for name, tensor in found.items():
        difference = float((tensor.double() - expected[name]).abs().max())
        near = difference < (OF_WEIGHTS_BY_DEFAULT if by_default else OF_WEIGHTS)
        assert near or (by_default and name.endswith("key.bias")), f"{name}: {difference:.1e}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.architecture)
def test_a_run_is_that_of_the_reference_step_by_step(case: Case, corpus: Corpus, tmp_path: Path):
    compare(case, corpus, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("splits", ENGINES, ids=lambda splits: "-".join(split.engine for split in splits))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.architecture)
def test_so_is_every_architecture_over_every_engine(case: Case, splits, corpus: Corpus, tmp_path: Path):
    compare(Case(case.architecture, case.num_blocks, case.flags, splits, case.packing), corpus, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("num_blocks", [1, 3, 63, 64, 65])
def test_so_is_a_run_over_a_corpus_of_any_size(corpus: Corpus, tmp_path: Path, num_blocks: int):
    epochs = 0.29 if num_blocks > GLOBAL_BATCH else 12.5  # a step then takes a block several times
    flags = {"num_train_epochs": epochs, "max_steps": -1, "warmup_steps": 1, "mask_unit": "span"}
    compare(Case("bert", num_blocks, flags, (Split("ddp", 2, 3),)), corpus, tmp_path)


KINDS = ["linear", "cosine", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup", WSD]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 1, 1.0, 2, 0.1, 0.29, 0.5])
def test_learning_rates_are_those_of_the_documented_formulas(kind: str, warmup: float):
    decays = [{}, {"num_decay_steps": 0.29, "decay_type": "1-sqrt"}, {"num_decay_steps": 1}] if kind == WSD else [{}]
    for total, more in product((1, 2, 3, 7, 100), decays):
        flags = {"learning_rate": 3e-4, "lr_scheduler_type": kind, "lr_scheduler_kwargs": more, "warmup_steps": warmup}
        config = TrainConfig(output_dir="", **flags)
        options = Options(global_batch=8, total_samples=1, total_steps=total, **flags)
        if kind == WSD and steps_of(warmup, total) + steps_of(more.get("num_decay_steps", 0.1), total) > total:
            with pytest.raises(ConfigError, match="do not fit into a run"):
                learning_rate_schedule(config, total)
            continue
        rates = [learning_rate_schedule(config, total)(step) for step in range(total)]
        expected = [3e-4 * factor(step, options) for step in range(total)]
        assert rates == pytest.approx(expected, rel=1e-12, abs=1e-18), (total, more)


def test_losses_of_half_precision_scores_are_summed_in_fp32():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 50, generator=generator).mul(4).to(torch.bfloat16)
    targets = torch.randint(50, (300,), generator=generator)
    targets[::7] = IGNORED
    real = scores.double()[targets != IGNORED]
    expected = (real.logsumexp(-1) - real[range(len(real)), targets[targets != IGNORED]]).sum()
    found = masked_loss_sum(scores, targets)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(expected), rel=OF_SUMS)
