"""Training refuses what cannot work before any step: one line, exit code 2, nothing on disk."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from ranks import cloze_ranks, succeed


def refused(argv: list[str], folder: Path) -> str:
    """The one line that a command ends with."""
    outcome = cloze_ranks(argv, 1, "single", folder / "log")[0]
    lines = [line for line in outcome.output.splitlines() if line.startswith("cloze: error: ")]
    assert outcome.code == 2, outcome.output
    assert len(lines) == 1, outcome.output
    assert "Traceback" not in outcome.output
    return lines[0]


def flags(prepared: Path, output: Path, *more: str) -> list[str]:
    return [
        "train",
        *TINY_MODEL,
        "--max_steps",
        "2",
        "--dataset_name",
        str(prepared),
        "--output_dir",
        str(output),
        *more,
    ]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--mlm_probability", "1.5"], "--mlm_probability: must be above 0 and at most 1"),
        (["--mlm_probability", "0"], "--mlm_probability: must be above 0 and at most 1"),
        (["--mask_replace_prob", "0.9", "--random_replace_prob", "0.2"], "must not be above 1 together"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size: must be at least 1"),
        (["--gradient_checkpointing_every_n_layers", "2"], "needs --gradient_checkpointing"),
        (["--gradient_checkpointing_every_n_layers", "0"], "must be at least 1"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], "nothing to train"),
        (["--bf16", "--fp16"], "choose one"),
        (["--block_size", "64"], "was prepared with 32; leave the option out"),
        (["--packing", "best_fit"], "was prepared with concat; leave the option out"),
        (["--fp16"], "fp16 needs a GPU"),
        (["--lr_scheduler_type", "zigzag"], "--lr_scheduler_type"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "depends on more than the step"),
        (
            [
                *("--max_steps", "-1", "--num_train_epochs", "1", "--warmup_steps", "10"),
                *("--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 9999}'),
            ],
            "do not fit into a run of",
        ),
        (["--save_total_limit", "0"], "--save_total_limit"),
        (["--ema_decay", "1.5"], "--ema_decay: must be above 0 and below 1, not 1.5"),
        (["--report_to", "nosuchtracker"], "--report_to"),
        (["--config_overrides", "hidden_size"], "write it as a=1,b=[2,3],c.d=4"),
        (["--config_overrides", "hiden_size=3"], "hiden_size"),
        (["--config_overrides", "max_position_embeddings=20"], "blocks of 32 tokens, but the model takes 18"),
        (
            ["--config_overrides", "vocab_size=100"],
            "the tokenizer has 600 tokens, but the model has embeddings for 100",
        ),
        (["--model_type", "gpt2"], "no masked language model of type gpt2"),
        (["--model_type", "gpt2", "--max_steps", "-1", "--num_train_epochs", "1e-9"], "nothing to train"),
        (
            ["--model_type", "gpt2", "--batch_size_warmup_steps", "2", "--batch_size_warmup_start", "999"],
            "--batch_size_warmup_start: must not be above the 8 blocks of a full step",
        ),
        (["--config_overrides", "hidden_act=foo"], "--config_overrides: no model can be made with them"),
        (["--model_type", "null"], "which model?"),
        (["--model_name_or_path", "./nowhere"], "./nowhere: cannot load the configuration"),
        (["--resume_from_checkpoint", "./nowhere"], "not a checkpoint"),
        (["--deepspeed", "./nowhere.json"], "nowhere.json"),
        (["--dataset_name", "./nowhere"], "nowhere: no such folder; make it with `cloze prepare"),
        (["--dataset_name", "./nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--dataset_name", "./no*where.txt.gz"], "no*where.txt.gz: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_values_that_cannot_work(prepared: Path, tmp_path: Path, more: list[str], expected: str):
    assert expected in refused(flags(prepared, tmp_path / "run", *more), tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_prepared(prepared: Path, tmp_path: Path):
    assert "not a prepared folder; make it with `cloze prepare" in refused(flags(tmp_path, tmp_path / "run"), tmp_path)
    shutil.copytree(prepared, tmp_path / "cut")
    shard = next((tmp_path / "cut" / "train").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert str(shard) in refused(flags(tmp_path / "cut", tmp_path / "run"), tmp_path)


def test_evaluation_without_validation_blocks(prepared: Path, tmp_path: Path):
    from cloze.data.prepared.shards import manifest_checksum

    shutil.copytree(prepared, tmp_path / "train-only")
    manifest = json.loads((tmp_path / "train-only" / "manifest.json").read_text())
    del manifest["splits"]["validation"]
    manifest["checksum"] = manifest_checksum(manifest)
    (tmp_path / "train-only" / "manifest.json").write_text(json.dumps(manifest))
    line = refused(flags(tmp_path / "train-only", tmp_path / "run", "--eval_strategy", "epoch"), tmp_path)
    assert "has no validation blocks" in line


def test_an_output_folder_in_use_is_left_alone(prepared: Path, tmp_path: Path):
    succeed(cloze_ranks(flags(prepared, tmp_path / "run"), 1, "single", tmp_path / "log"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    line = refused(flags(prepared, tmp_path / "run"), tmp_path)
    assert "holds a run already; continue it with --resume_from_checkpoint auto" in line
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_run_resumed_in_another_precision_is_told_so_and_a_time_limit_without_a_job_is_ignored(
    prepared: Path, tmp_path: Path
):
    argv = [*flags(prepared, tmp_path / "run"), "--save_before_time_limit", "9"]
    outcomes = cloze_ranks(argv, 1, "single", tmp_path / "log")
    succeed(outcomes)
    assert outcomes[0].output.count("ignored: --save_before_time_limit 9 (SLURM sets no end time here)") == 1
    checkpoint = next((tmp_path / "run").glob("checkpoint-*"))
    resumed = [*flags(prepared, tmp_path / "run"), "--resume_from_checkpoint", str(checkpoint), "--bf16"]
    outcomes = cloze_ranks(resumed, 1, "single", tmp_path / "more")
    succeed(outcomes)
    assert outcomes[0].output.count("was trained in fp32, and this start trains in bf16") == 1


def test_resuming_another_run_names_what_differs(prepared: Path, tmp_path: Path):
    succeed(cloze_ranks(flags(prepared, tmp_path / "run"), 1, "single", tmp_path / "log"))
    before = (tmp_path / "run" / "config.yaml").read_text()
    for more, expected in (
        (["--learning_rate", "1e-3"], "learning_rate 5e-05 -> 0.001"),
        (["--seed", "1", "--weight_decay", "0.5"], "weight_decay 0.0 -> 0.5; seed 42 -> 1"),
        (
            ["--per_device_train_batch_size", "4"],
            "4 blocks a step, but the resumed run uses 8; choose 1 and 8, 2 and 4",
        ),
    ):
        argv = flags(prepared, tmp_path / "run", "--resume_from_checkpoint", "auto", *more)
        assert expected in refused(argv, tmp_path)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    "settings", ['{"zero_optimization": {"stage": "three"}}', '{"zero_optimization": null}', "[2]"]
)
def test_deepspeed_settings_without_a_stage_are_one_line(prepared: Path, tmp_path: Path, settings: str):
    (tmp_path / "ds.json").write_text(settings)
    words = flags(prepared, tmp_path / "run", "--deepspeed", str(tmp_path / "ds.json"))
    assert re.search(r"ds\.json: (no stage of ZeRO can be read in it|not a JSON object)", refused(words, tmp_path))


def test_a_deepspeed_file_of_transformers_trainer_is_refused_before_the_data(tmp_path: Path):
    settings = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    words = flags(tmp_path / "nowhere", tmp_path / "run", "--deepspeed", str(tmp_path / "ds.json"))
    assert "optimizer: is set by Cloze itself; take it out, and use --optim" in refused(words, tmp_path)
