"""Frozen parameters are saved whole under ZeRO-3, at any moment of a run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from ranks import cloze_ranks, succeed
from repository import ROOT

from cloze.checkpoint.format import read_manifest
from cloze.checkpoint.reader import PieceReader


def without_cpu_adam() -> None:
    """Make DeepSpeed's CPU Adam unusable in a rank: on a CPU, Cloze keeps torch's AdamW."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    DeepSpeedCPUAdam.__init__ = None


def test_frozen_parameters_are_saved_after_a_forward_pass_without_a_backward_pass(prepared: Path, tmp_path: Path):
    """An evaluation leaves prefetched parameters, which DeepSpeed refuses to gather."""
    settings = json.loads((ROOT / "ds_configs" / "zero3_offload.json").read_text())
    for name in ("zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer", "steps_per_print"):
        del settings[name]  # Cloze sets these itself
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    shape = "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=24,local_attention=8"
    model = ["--model_type", "modernbert", "--config_overrides", shape]
    argv = ["train", *model, "--dataset_name", str(prepared), "--output_dir", str(tmp_path / "run")]
    argv += ["--per_device_train_batch_size", "2", "--freeze", r".*layers\.0\.", "--max_steps", "4"]
    argv += ["--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]
    argv += ["--deepspeed", str(tmp_path / "settings.json")]
    succeed(cloze_ranks(argv, 2, "zero3", tmp_path / "log", without_cpu_adam))
    first, last = (tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4))
    with PieceReader(first, read_manifest(first)) as one, PieceReader(last, read_manifest(last)) as other:
        frozen = [name for name, facts in read_manifest(first)["parameters"].items() if not facts["trained"]]
        assert frozen
        assert all(torch.equal(one.frozen(name), other.frozen(name)) for name in frozen)
