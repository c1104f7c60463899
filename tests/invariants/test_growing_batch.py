"""A run whose batch grows, whose masking rate falls and whose masks are spans: one run, whatever computes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from corpus import TINY_MODEL_NO_DROPOUT
from ranks import cloze_ranks, succeed
from recording import digest, record, recorded_steps, stop_at

from cloze.data.batches.batch_size_warmup import BatchSizes
from cloze.tools.inspect.replay import rebuild

STEPS, SIZES = 12, BatchSizes(full=8, start=1, warmup_steps=8)
FLAGS = [*TINY_MODEL_NO_DROPOUT, "--max_steps", str(STEPS), "--logging_steps", "1", "--learning_rate", "1e-3"]
FLAGS += ["--save_steps", "1000", "--eval_strategy", "steps", "--eval_steps", "6", "--seed", "5"]
FLAGS += ["--mask_unit", "span", "--mlm_probability", "0.4", "--mlm_probability_end", "0.15"]
FLAGS += ["--batch_size_warmup_steps", "8", "--batch_size_warmup_start", "1", "--resume_from_checkpoint", "auto"]


def flags(prepared: Path, output: Path, per_device: int, accumulation: int) -> list[str]:
    batch = ["--per_device_train_batch_size", str(per_device), "--gradient_accumulation_steps", str(accumulation)]
    return ["train", *FLAGS, *batch, "--dataset_name", str(prepared), "--output_dir", str(output)]


def curve(run: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    assert [line["samples_seen"] for line in trained] == [SIZES.samples_before(step + 1) for step in range(STEPS)]
    evaluated = [(line["eval_loss"], 1.0) for line in lines if "eval_loss" in line]
    assert len(evaluated) == 2
    return [(line["loss"], line["grad_norm"]) for line in trained] + evaluated


@pytest.fixture(scope="module")
def reference(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """One process, undisturbed; and its batches are the ones that `cloze replay` rebuilds."""
    folder = tmp_path_factory.mktemp("reference")
    succeed(cloze_ranks(flags(prepared, folder / "run", 8, 1), 1, "single", folder / "log", record(folder / "seen")))
    for step, trained in recorded_steps(folder / "seen").items():
        batch = rebuild(folder / "run", step + 1)
        assert len(trained) == SIZES.size(step)
        assert trained == {
            int(sample): digest(ids, labels)
            for sample, ids, labels in zip(batch.samples, batch.input_ids, batch.labels, strict=True)
        }
    return np.array(curve(folder / "run"))


def test_a_growing_batch_gives_the_same_curve_stopped_and_moved_from_2_ranks_to_3(prepared, tmp_path, reference):
    """Two ranks have 1 to 2 forward passes a step while the batch grows, and one of them nothing to do at first."""
    argv = flags(prepared, tmp_path / "run", 2, 2)
    outcomes = cloze_ranks(argv, 2, "zero2", tmp_path / "log", record(tmp_path / "seen", stop_at(5, 1)))
    assert [outcome.code for outcome in outcomes] == [75, 75], outcomes[0].output
    assert "1 growing to 8 blocks a step in 8 steps" in outcomes[0].output
    succeed(cloze_ranks(argv, 3, "zero2", tmp_path / "log", record(tmp_path / "seen")))
    seen = recorded_steps(tmp_path / "seen")
    assert {step: sorted(samples) for step, samples in seen.items()} == {
        step: list(range(SIZES.samples_before(step), SIZES.samples_before(step + 1))) for step in range(STEPS)
    }
    difference = np.abs(np.array(curve(tmp_path / "run")) / reference - 1)
    assert difference.max() < 1e-5
