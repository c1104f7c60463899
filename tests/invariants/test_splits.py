"""The same run, however its global batch is split, whatever engine holds its state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import TINY_MODEL_NO_DROPOUT
from ranks import ENGINES, cloze_ranks, succeed
from repository import ROOT

from cloze.config import TrainConfig
from cloze.data.batches.layout import Layout
from cloze.data.batches.loader import step_batches
from cloze.data.batches.masking import IGNORE_INDEX, Masking
from cloze.data.prepared.shards import open_prepared
from cloze.model.load import build_model

STEPS = 30
SLOW = pytest.mark.slow
# ranks x blocks per device x accumulation: a global batch of 8. tests/pairwise covers other splits on each engine
WHOLE, SPLIT = (1, 8, 1), (2, 2, 2)
FLAGS = [*TINY_MODEL_NO_DROPOUT, "--max_steps", str(STEPS), "--logging_steps", "1", "--save_strategy", "no"]
FLAGS += ["--learning_rate", "1e-3", "--weight_decay", "0.1", "--warmup_steps", "5", "--seed", "3"]
# The norm is above 1 in every step, so that clipping is always at work.


def flags(prepared: Path, output: Path, split: tuple[int, int, int]) -> list[str]:
    _, per_device, accumulation = split
    batch = ["--per_device_train_batch_size", str(per_device), "--gradient_accumulation_steps", str(accumulation)]
    return ["train", *FLAGS, *batch, "--dataset_name", str(prepared), "--output_dir", str(output)]


def curve(run: Path) -> np.ndarray:
    """[steps, 2]: loss and gradient norm."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return np.array([(line["loss"], line["grad_norm"]) for line in lines])


def assert_same_curve(one: np.ndarray, other: np.ndarray) -> None:
    relative = np.abs(one - other) / np.abs(other)
    assert relative.max() < 1e-5, f"largest relative difference {relative.max():.1e} at step {relative.argmax() // 2}"


@pytest.fixture(scope="module")
def reference(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """One process, one micro-batch, no DeepSpeed."""
    folder = tmp_path_factory.mktemp("reference")
    succeed(cloze_ranks(flags(prepared, folder / "run", WHOLE), 1, "single", folder))
    return curve(folder / "run")


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_same_losses_and_norms(prepared, tmp_path, reference, engine):
    run = tmp_path / "run"
    succeed(cloze_ranks(flags(prepared, run, SPLIT), SPLIT[0], engine, tmp_path / "log"))
    assert_same_curve(curve(run), reference)


@pytest.mark.parametrize("config", ["zero2", *(pytest.param(name, marks=SLOW) for name in ("cpu", "zero3", "fsdp2"))])
def test_so_do_runs_started_with_the_shipped_accelerate_configurations(prepared, tmp_path, reference, config):
    words = ["-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{config}.yaml"]
    words += ["--main_process_port", "0", "-m", "cloze", *flags(prepared, tmp_path / "run", SPLIT)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    engine = {"cpu": "DDP", "fsdp2": "FSDP2"}.get(config, f"DeepSpeed ZeRO-{config[-1]}")
    assert f"2 ranks on 1 host, {engine}, fp32, cpu, gloo" in done.stdout
    assert_same_curve(curve(tmp_path / "run"), reference)


def test_the_first_step_is_that_of_plain_pytorch(prepared: Path, reference: np.ndarray):
    """Loss and gradient norm of one big batch, computed with nothing of Cloze but the batch."""
    data = open_prepared(prepared)
    config = TrainConfig(
        dataset_name=str(prepared),
        output_dir="unused",
        model_type=TINY_MODEL_NO_DROPOUT[1],
        config_overrides=TINY_MODEL_NO_DROPOUT[3],
    )
    model, _ = build_model(config, data.tokenizer_dir, data.block_size, seed=3)
    masking = Masking.from_manifest(data.manifest, seed=3)
    batch = step_batches(data.blocks("train"), masking, Layout(8, 1, 0, 1), 10**6, 0).micro_batches[0]
    labels = batch["labels"]
    assert (labels != IGNORE_INDEX).sum() > 20
    loss = model.train()(input_ids=batch["input_ids"], labels=labels).loss
    loss.backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
    assert abs(loss.item() - reference[0, 0]) / reference[0, 0] < 1e-6
    assert abs(norm.item() - reference[0, 1]) / reference[0, 1] < 1e-6
