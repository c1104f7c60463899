"""StableAdamW and Muon with layer-wise learning rates give the same run on any number of ranks, stopped or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import assert_same_checkpoint
from corpus import TINY_MODEL_NO_DROPOUT
from ranks import cloze_ranks, succeed

STEPS = ["--max_steps", "6", "--save_steps", "3", "--logging_steps", "1", "--learning_rate", "2e-3"]
STEPS += ["--weight_decay", "0.1", "--freeze", ".*layer.0.attention", "--layerwise_lr_decay", "0.8"]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def split(world_size: int) -> list[str]:
    return ["--per_device_train_batch_size", str(8 // world_size)]


@pytest.mark.parametrize("optim", ["stable_adamw", "muon"])
def test_an_optimizer_that_needs_whole_tensors(prepared: Path, tmp_path: Path, optim: str, muon_in_fp32: None):
    """One process and two are one run, and a resumed run ends with the same bits; with frozen parameters."""
    flags = ["train", *TINY_MODEL_NO_DROPOUT, *STEPS, "--optim", optim, "--dataset_name", str(prepared)]
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    succeed(cloze_ranks([*flags, *split(1), "--output_dir", str(one)], 1, "single", tmp_path / "a"))
    succeed(cloze_ranks([*flags, *split(2), "--output_dir", str(two)], 2, "ddp", tmp_path / "b"))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    resumes_run = ["--output_dir", str(resumed), "--resume_from_checkpoint", str(two / "checkpoint-3")]
    succeed(cloze_ranks([*flags, *split(2), *resumes_run], 2, "ddp", tmp_path / "c"))
    assert_same_checkpoint(two / "checkpoint-6", resumed / "checkpoint-6")
    manifest = json.loads((two / "checkpoint-6" / "checkpoint.json").read_text())
    keys = {(piece["name"], piece["key"]) for piece in manifest["pieces"]}
    expected = {"momentum_buffer"} if optim == "muon" else {"exp_avg", "exp_avg_sq"}
    matrix = "roberta.encoder.layer.1.attention.self.query.weight"
    assert {key for name, key in keys if name == matrix} == {"weight", *expected}
    assert {group["step"] for group in manifest["optimizer"]["groups"]} == {6}
