"""A run that is stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import assert_same_checkpoint
from corpus import TINY_MODEL
from ranks import ENGINES, cloze_ranks, succeed

STEPS = ["--max_steps", "6", "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-3"]
BATCH = ["--weight_decay", "0.1", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]


SLOW = [("zero0", "bf16"), ("zero1", "bf16"), ("zero3", "bf16"), ("fsdp2", "fp32"), ("fsdp2", "bf16")]


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        pytest.param(engine, precision, marks=pytest.mark.slow if (engine, precision) in SLOW else ())
        for engine in ENGINES
        for precision in ("fp32", "bf16")
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(prepared: Path, tmp_path: Path, engine: str, precision: str):
    """With dropout, two parameter groups, accumulation and clipping; resumed twice."""
    flags = [*TINY_MODEL, *STEPS, *BATCH, "--dataset_name", str(prepared)]
    flags += ["--bf16"] if precision == "bf16" else []
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    succeed(cloze_ranks(["train", *flags, "--output_dir", str(whole)], 2, engine, tmp_path / "a"))
    for checkpoint in (whole / "checkpoint-2", resumed / "checkpoint-4"):
        flags_here = [*flags, "--output_dir", str(resumed), "--resume_from_checkpoint", str(checkpoint)]
        succeed(cloze_ranks(["train", *flags_here], 2, engine, tmp_path / "b"))
    assert_same_checkpoint(whole / "checkpoint-6", resumed / "checkpoint-6")
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert len({line["loss"] for line in lines}) == 6


def test_auto_goes_on_from_the_newest_checkpoint_and_starts_where_there_is_none(prepared: Path, tmp_path: Path):
    flags = ["train", *TINY_MODEL, *STEPS, *BATCH, "--dataset_name", str(prepared)]
    flags += ["--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "auto"]
    succeed(cloze_ranks(flags, 1, "single", tmp_path / "a"))
    steps = [path.name for path in sorted((tmp_path / "run").glob("checkpoint-*"))]
    assert steps == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    outcomes = cloze_ranks(flags, 1, "single", tmp_path / "b")
    succeed(outcomes)
    assert "at step 6" in outcomes[0].output
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6
