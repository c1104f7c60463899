"""Every pair of values of training options occurs in a run that matches the reference, or it is refused.

The reference does not implement StableAdamW and Muon: they are compared with a run on one process without the options
that do not change the numbers; samples, masks, learning rates and the first step are compared with the reference.

Tolerances. fp32: those of `reference.test_training`, which names their causes. Muon and StableAdamW divide by norms of
whole tensors, which two splits sum in different orders in fp32: 1e-5. bf16 rounds each value by up to 2^-9, and these
errors partly cancel in sums: losses differ by less than 5e-4, norms by less than 5e-3, and a parameter's total
movement by less than 0.04 of it. Twice that is allowed. A parameter whose gradient is 0 except for rounding should not
move: UNMOVED_BF16 is how far its elements may move, since AdamW divides the rounding error by epsilon.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from ranks import ENGINES, cloze_ranks
from recording import digest, recorded_steps
from reference.masks import Rule
from reference.order import batch_size
from reference.runs import BLOCK, KIND, Corpus, Split, fill, lines, load_model, make_corpus, make_model, train
from reference.training import Options
from reference.training import train as reference_train

from cloze.checkpoint.format import read_manifest
from cloze.checkpoint.reader import PieceReader
from cloze.config import TrainConfig
from cloze.model.compiled import compile_backbone, compile_layers
from cloze.training.engines import base, fsdp2
from pairwise.covering import Row, covering_array, is_allowed, pairs, pairs_of
from pairwise.options import (
    COMPUTED,
    GLOBAL_BATCH,
    OPTIONS,
    REFUSALS,
    WHOLE_TENSORS,
    Refusal,
    flags_of,
    parts_of,
)

SEED, STEPS, STOP, NUM_BLOCKS = 3, 4, 2, 17
FLAGS = {"seed": SEED, "learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": STEPS}
OF_LOSSES_BF16, OF_NORMS_BF16, OF_UPDATES_BF16, UNMOVED_BF16 = 1e-3, 1e-2, 0.08, 1e-4
REFUSED = [refusal.values for refusal in REFUSALS]
ROWS = covering_array(OPTIONS, REFUSED)


@dataclass(frozen=True)
class Result:
    """The results of a run: loss, gradient norm and learning rate of each step [steps, 3], trained weights, averages,
    and the digest of each sample in each step, if known."""

    curve: np.ndarray
    weights: dict[str, torch.Tensor]
    averages: dict[str, torch.Tensor]
    samples: dict[int, dict[int, str]] | None = None


def run_row(row: Row, corpus: Corpus, folder: Path) -> Result:
    """Run Cloze with the options of a row."""
    data, _ = fill(corpus, KIND.get(row["model"], "bpe"), NUM_BLOCKS, row["packing"])
    model, parts = make_model(row["model"], corpus), parts_of(row)
    for number, (split, how) in enumerate(parts, 1):
        flags = {**FLAGS, "global_batch_size": GLOBAL_BATCH, **flags_of(row, COMPUTED), **how}
        train(model, data, folder / "run", split, flags, STOP if number < len(parts) else None)
    return result_of(folder / "run", load_model(model))


def result_of(run: Path, initial: Any) -> Result:
    """Return the stored results of a run. Fails if a parameter that was not trained differs from its initial value."""
    curve = [
        [np.nan if line["loss"] is None else line["loss"], line["grad_norm"], line["learning_rate"]]
        for line in lines(run)
    ]
    checkpoint = run / f"checkpoint-{STEPS}"
    manifest = read_manifest(checkpoint)
    weights, averages = {}, {}
    with PieceReader(checkpoint, manifest) as pieces:
        for name, facts in manifest["parameters"].items():
            if not facts["trained"]:
                assert torch.equal(pieces.frozen(name), initial.get_parameter(name)), name
                continue
            weights[name] = pieces.read(name, "weight").view(facts["shape"]).clone()
            if "ema" in pieces.keys(name):
                averages[name] = pieces.read(name, "ema").view(facts["shape"]).clone()
    return Result(np.array(curve), weights, averages, recorded_steps(run.with_name("run-seen")))


def expected(row: Row, corpus: Corpus, folder: Path) -> Result:
    """Return the reference's results for a row. If it lacks the optimizer, weights and the numbers of later steps are
    those of a plain run of Cloze."""
    reference = by_reference(row, corpus)
    if row["optim"] not in WHOLE_TENSORS:
        return reference
    data, _ = fill(corpus, KIND.get(row["model"], "bpe"), NUM_BLOCKS, row["packing"])
    flags = {**FLAGS, "global_batch_size": GLOBAL_BATCH, **flags_of(row, COMPUTED)}
    model = make_model(row["model"], corpus)
    train(model, data, folder / "plain" / "run", Split("single", 1, GLOBAL_BATCH), flags)
    plain = result_of(folder / "plain" / "run", load_model(model))
    plain.curve[0], plain.curve[:, 2] = reference.curve[0], reference.curve[:, 2]
    return replace(plain, samples=reference.samples)


def by_reference(row: Row, corpus: Corpus) -> Result:
    """Return the reference's results for a row, with AdamW in place of optimizers that it lacks."""
    kind, flags = KIND.get(row["model"], "bpe"), {**FLAGS, **flags_of(row, COMPUTED)}
    _, blocks = fill(corpus, kind, NUM_BLOCKS, row["packing"])
    growth = flags.get("batch_size_warmup_start", 1), flags.get("batch_size_warmup_steps", 0)
    total = sum(batch_size(step, GLOBAL_BATCH, *growth) for step in range(STEPS))
    known = {name: value for name, value in flags.items() if name in Options.__dataclass_fields__}
    options = Options(global_batch=GLOBAL_BATCH, total_samples=total, total_steps=STEPS, **known)
    rates = flags.get("mlm_probability", 0.15), 0.8, 0.1
    unit, end = flags["mask_unit"], flags.get("mlm_probability_end")
    rule = Rule(corpus.tokenizer(kind), SEED, *rates, unit, end, total_samples=total, block_size=BLOCK)
    steps = list(reference_train(load_model(make_model(row["model"], corpus)), blocks, rule, options))
    samples = {
        number: {
            sample: digest(np.array(i), np.array(t))
            for sample, i, t in zip(step.samples, step.input_ids, step.labels, strict=True)
        }
        for number, step in enumerate(steps)
    }
    curve = np.array([[step.loss, step.grad_norm, step.learning_rate] for step in steps])
    averages = steps[-1].averages if options.ema_decay is not None else {}
    return Result(curve, steps[-1].weights, averages, samples)


def assert_same(found: Result, wanted: Result, row: Row, initial: Any) -> None:
    """Fail if two results differ by more than the precision and the optimizer of the row explain."""
    half = row["precision"] != "fp32"
    of_sums, of_weights = (1e-5, 1e-5) if row["optim"] in WHOLE_TENSORS else (1e-6, 2e-6)
    assert wanted.samples == found.samples, "samples or masks"
    rates, losses, norms = found.curve[:, 2], found.curve[:, 0], found.curve[:, 1]
    np.testing.assert_allclose(rates, wanted.curve[:, 2], rtol=1e-12, err_msg="learning rate")
    np.testing.assert_allclose(losses, wanted.curve[:, 0], rtol=OF_LOSSES_BF16 if half else of_sums, err_msg="loss")
    np.testing.assert_allclose(norms, wanted.curve[:, 1], rtol=OF_NORMS_BF16 if half else of_sums, err_msg="norm")
    for here, there in ((found.weights, wanted.weights), (found.averages, wanted.averages)):
        assert here.keys() == there.keys()
        for name, tensor in here.items():
            apart = (tensor.double() - there[name].double()).detach()
            if not half:
                assert float(apart.abs().max()) < of_weights, name
                continue
            moved = float((there[name] - initial.get_parameter(name).detach()).double().norm())
            assert float(apart.norm()) < OF_UPDATES_BF16 * moved + UNMOVED_BF16 * apart.numel() ** 0.5, name


def sample_of(rows: list[Row], number: int) -> list[Row]:
    """Return rows that together have the most engines and the most values other than the first one of an option. Rows
    that are compiled, which takes seconds, or end on DDP, which many tests use, are left out."""

    def values(row: Row) -> set[tuple[str, str]]:
        other = {(option, value) for option, value in row.items() if value != OPTIONS[option][0]}
        return {*other, ("engine", row["engine"]), ("engine", row["begun"])}

    rest, seen, chosen = [row for row in rows if row["compile"] == "no" and row["engine"] != "ddp"], set(), []
    for _ in range(number):
        chosen.append(max(rest, key=lambda row: len(values(row) - seen)))
        seen |= values(chosen[-1])
    return chosen


SAMPLE = sample_of(ROWS, 3)
CASES = [
    pytest.param(row, id=f"{number}-{row['engine']}", marks=() if row in SAMPLE else pytest.mark.slow)
    for number, row in enumerate(ROWS)
]


@pytest.mark.parametrize("row", CASES)
def test_a_row_matches_the_reference(
    row: Row, corpus: Corpus, tmp_path: Path, compiled_without_inductor: None, muon_in_fp32: None
):
    initial = load_model(make_model(row["model"], corpus))
    assert_same(run_row(row, corpus, tmp_path), expected(row, corpus, tmp_path), row, initial)


def test_every_pair_of_values_is_in_a_row_unless_it_is_refused():
    there = {pair for row in ROWS for pair in pairs_of(row)}
    for pair in pairs(OPTIONS):
        refused = any(all(dict(pair).get(name) in values for name, values in each.items()) for each in REFUSED)
        assert (pair in there) != refused, pair
    assert all(is_allowed(row, REFUSED) for row in ROWS)


def test_every_value_that_an_option_can_have_is_combined():
    """A new optimizer, packing or mask unit must be added to the options."""
    hints = get_type_hints(TrainConfig)
    for name in ("mask_unit", "packing", "optim"):
        assert {*OPTIONS[name], "adamw_torch"} == {*get_args(hints[name]), "adamw_torch"}, name
    assert set(OPTIONS["precision"]) == {*get_args(hints["precision"])} - {"auto", "fp8"}
    assert {*OPTIONS["engine"]} > {*ENGINES}


def refused_rows() -> list[Any]:
    """Return a row for each combination in the table; by default, only the first one of each entry is tried."""
    cases = []
    for refusal in REFUSALS:
        for place, values in enumerate(product(*refusal.values.values())):
            row = {name: options[0] for name, options in OPTIONS.items()} | dict(
                zip(refusal.values, values, strict=True)
            )
            marks = pytest.mark.slow if place else ()
            cases.append(pytest.param(row, refusal, id="-".join(values), marks=marks))
    return cases


@pytest.mark.parametrize(("row", "refusal"), refused_rows())
def test_a_refused_combination_is_a_one_line_error_before_data_are_read(row: Row, refusal: Refusal, tmp_path: Path):
    split, how = parts_of({**row, "ranks": "1"})[0]
    words = ["train", "--model_type", "roberta", "--dataset_name", str(tmp_path / "missing")]
    words += ["--tokenizer_name", str(tmp_path / "missing"), "--output_dir", str(tmp_path / "run")]
    for name, value in {**flags_of(row, COMPUTED), **how}.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    outcome = cloze_ranks(words, split.ranks, split.engine, tmp_path / "log")[0]
    told = [line for line in outcome.output.splitlines() if line.startswith("cloze: error: ")]
    assert outcome.code == 2, outcome.output
    assert len(told) == 1
    assert told[0].startswith(f"cloze: error: {refusal.where}: ")
    assert refusal.what in told[0]
    assert "; " in told[0], "no hint"
    assert "Traceback" not in outcome.output
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A small corpus with a tokenizer of each kind."""
    return make_corpus(tmp_path_factory.mktemp("pairwise"))


@pytest.fixture
def compiled_without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile with `aot_eager`: inductor takes minutes for each row; `test_compiled` covers it."""
    monkeypatch.setattr(base, "compile_backbone", partial(compile_backbone, backend="aot_eager"))
    monkeypatch.setattr(fsdp2, "compile_layers", partial(compile_layers, backend="aot_eager"))
