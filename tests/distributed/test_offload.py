"""Offload to host memory and to a disk: checkpoints, resuming on other ranks and engines, the moving average."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from offload import settings
from ranks import cloze_ranks, succeed
from safetensors.torch import load_file

# DeepSpeed leaves tensors below 1 MiB in memory; a third of 9.4 MB is above it.
MODEL = ["--model_type", "roberta", "--config_overrides"]
MODEL += [
    "hidden_size=768,num_hidden_layers=2,num_attention_heads=4,intermediate_size=3072,"
    "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
]
FLAGS = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-4"]
FLAGS += ["--ema_decay", "0.9", "--weight_decay", "0.1", "--resume_from_checkpoint", "auto"]


def train(prepared: Path, folder: Path, world_size: int, *more: str) -> np.ndarray:
    """The losses of the whole run in `folder`."""
    argv = ["train", *MODEL, *FLAGS, "--dataset_name", str(prepared), "--output_dir", str(folder / "run"), *more]
    argv += ["--per_device_train_batch_size", str(6 // world_size)]
    succeed(cloze_ranks(argv, world_size, "ddp", folder / f"log-{world_size}", timeout=900))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


def consolidated(folder: Path, weights: str) -> dict[str, np.ndarray]:
    argv = ["consolidate", str(folder / "run"), "--weights", weights, "--output", str(folder / weights)]
    succeed(cloze_ranks(argv, 1, "single", folder / "log"))
    return {name: value.numpy() for name, value in load_file(folder / weights / "model.safetensors").items()}


@pytest.fixture(scope="module")
def plain(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, dict[str, dict]]:
    folder = tmp_path_factory.mktemp("plain")
    curve = train(prepared, folder, 1)
    return curve, {weights: consolidated(folder, weights) for weights in ("trained", "ema")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload", "zero3_nvme"])
def test_an_offloaded_run_is_saved_resumed_and_consolidated_as_any_other(prepared, tmp_path: Path, plain, name: str):
    curve, weights = plain
    how = ["--deepspeed", settings(name, tmp_path)]
    np.testing.assert_allclose(train(prepared, tmp_path, 2, *how), curve, rtol=1e-5)
    for world_size, engine in ((3, how), (1, [])):  # from its checkpoint, also without DeepSpeed
        shutil.rmtree(tmp_path / "run" / "checkpoint-4")
        np.testing.assert_allclose(train(prepared, tmp_path, world_size, *engine), curve, rtol=1e-5)
        for kind, expected in weights.items():
            found = consolidated(tmp_path, kind)
            shutil.rmtree(tmp_path / kind)
            assert found.keys() == expected.keys()
            for tensor, value in found.items():
                apart = np.abs(value - expected[tensor])
                # Where a gradient is nothing but rounding, AdamW makes a step of it that is as large as any.
                assert apart.mean() < 1e-6, (kind, tensor)
                assert apart.max() < 1e-4, (kind, tensor)


@pytest.mark.slow
def test_a_run_with_a_second_partition_inside_a_machine_is_resumed_as_any_other(prepared, tmp_path: Path, plain):
    """hpZ of ZeRO++: what a machine keeps for the backward pass follows the weights that are loaded."""
    for _ in range(2):
        found = train(prepared, tmp_path, 2, "--deepspeed", settings("zero3_hpz", tmp_path))
        np.testing.assert_allclose(found, plain[0], rtol=1e-5)
        shutil.rmtree(tmp_path / "run" / "checkpoint-4")


@pytest.mark.slow
def test_gradients_that_deepspeed_could_not_read_back_are_refused_before_the_first_step(prepared, tmp_path: Path):
    """Parts of 3,071 * 768 / 2 elements in a row: DeepSpeed would go on without a word, and with other losses."""
    odd = MODEL[3].replace("intermediate_size=3072", "intermediate_size=3071")
    argv = ["train", *MODEL[:3], odd, *FLAGS, "--dataset_name", str(prepared), "--output_dir", str(tmp_path / "run")]
    argv += ["--deepspeed", settings("zero3_nvme", tmp_path, sub_group_size=10**7)]
    outcomes = cloze_ranks(argv, 2, "ddp", tmp_path / "log")
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert "gradients begin at element" in outcomes[0].output.splitlines()[-1]
