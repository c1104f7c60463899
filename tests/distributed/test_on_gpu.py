"""What only a GPU shows. `pytest tests/distributed/test_on_gpu.py` on a machine that has one; skipped elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import assert_same_checkpoint
from corpus import TINY_MODEL, make_prepared
from repository import ROOT

from cloze.cli.commands.prepare import run as run_prepare
from cloze.config import PrepareConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FLAGS = [*TINY_MODEL, "--max_steps", "8", "--save_steps", "4", "--logging_steps", "1", "--learning_rate", "1e-3"]
FLAGS += ["--per_device_train_batch_size", "16", "--eval_strategy", "no"]


def train(prepared: Path, folder: Path, *more: str, engine: str | None = None) -> list[float]:
    """Losses of a run in a process of its own, alone or under a configuration of launch/accelerate."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{engine}.yaml"]
    start = [sys.executable, *([*launcher, "--num_processes", "1"] if engine else []), "-m", "cloze", "train"]
    words = [*start, "--dataset_name", str(prepared), "--output_dir", str(folder), *FLAGS, *more]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_run_in_bf16_gives_the_same_bits_again_and_resumed(prepared: Path, tmp_path: Path, compiled: str):
    flags = ["--torch_compile", compiled]
    once = train(prepared, tmp_path / "once", *flags)
    assert train(prepared, tmp_path / "again", *flags) == once
    assert_same_checkpoint(tmp_path / "once/checkpoint-8", tmp_path / "again/checkpoint-8")
    middle = ["--resume_from_checkpoint", str(tmp_path / "once/checkpoint-4")]
    assert train(prepared, tmp_path / "resumed", *flags, *middle)[-4:] == once[-4:]
    assert_same_checkpoint(tmp_path / "once/checkpoint-8", tmp_path / "resumed/checkpoint-8")


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_long_blocks_and_separate_documents_give_the_same_bits_again(tmp_path: Path, packing: str, attention: str):
    """Attention over blocks of 512 adds up several tiles; torch's kernels do so in any order unless it is strict."""
    source = make_prepared(tmp_path / "data", num_threads=1200, block_size=512)
    folder = tmp_path / packing
    run_prepare(
        PrepareConfig(
            dataset_name=str(source.parent / "corpus.jsonl"), text_field="answers.text", output=str(folder),
            tokenizer_name=str(source.parent / "tokenizer"), block_size=512, packing=packing,
        )
    )  # fmt: skip
    flags = ["--config_overrides", "hidden_size=128,num_hidden_layers=2,num_attention_heads=2,intermediate_size=256"]
    flags += ["--attn_implementation", attention, "--torch_compile", "false", "--per_device_train_batch_size", "8"]
    once = train(folder, tmp_path / "once", *flags)
    assert train(folder, tmp_path / "again", *flags) == once
    assert_same_checkpoint(tmp_path / "once/checkpoint-8", tmp_path / "again/checkpoint-8")


@pytest.mark.parametrize("engine", ["zero2", "zero3", "zero3_offload", "fsdp2"])
def test_engines_agree_to_the_rounding_of_bf16(prepared: Path, tmp_path: Path, engine: str):
    alone = train(prepared, tmp_path / "alone")
    divided = train(prepared, tmp_path / "divided", engine=engine)
    assert max(abs(ours / theirs - 1) for ours, theirs in zip(divided, alone, strict=True)) < 5e-3


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "fp16"],
        ["--precision", "fp32", "--tf32", "true"],
        ["--torch_compile_mode", "reduce-overhead"],
        ["--gradient_checkpointing"],
        ["--async_save"],
        ["--auto_find_batch_size", "--global_batch_size", "16"],
    ],
    ids=lambda flags: flags[0].strip("-") + "-" + flags[-1].strip("-"),
)
def test_a_setting_for_gpus_trains_to_the_same_losses(prepared: Path, tmp_path: Path, flags: list[str]):
    usual = train(prepared, tmp_path / "usual", "--torch_compile", "false", "--precision", "fp32")
    other = train(prepared, tmp_path / "other", *flags)
    assert max(abs(one / two - 1) for one, two in zip(other, usual, strict=True)) < 2e-2
