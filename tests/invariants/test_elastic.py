"""One run, moved between numbers of processes and engines, stopped in between: the same curve, the same samples."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from corpus import TINY_MODEL_NO_DROPOUT
from ranks import cloze_ranks, succeed
from recording import expected_steps, record, recorded_steps, stop_at

from cloze.train.checkpoint_files import read_manifest

STEPS, BATCH, SEED = 60, 8, 3
FNET = "hidden_size=32,num_hidden_layers=2,intermediate_size=64,hidden_dropout_prob=0.0"
FLAGS = [*TINY_MODEL_NO_DROPOUT, "--max_steps", str(STEPS), "--logging_steps", "1", "--save_strategy", "steps"]
FLAGS += ["--save_steps", "1000", "--learning_rate", "1e-3", "--weight_decay", "0.1", "--warmup_steps", "5"]
FLAGS += ["--seed", str(SEED)]
WORLDS = [2, 1, 3, 2]  # 8 blocks on 3 ranks do not divide


def flags(prepared: Path, output: Path, per_device: int, accumulation: int = 1) -> list[str]:
    batch = ["--per_device_train_batch_size", str(per_device), "--gradient_accumulation_steps", str(accumulation)]
    where = ["--dataset_name", str(prepared), "--output_dir", str(output), "--resume_from_checkpoint", "auto"]
    return ["train", *FLAGS, *batch, *where]


def curve(run: Path) -> np.ndarray:
    """[steps, 2]: loss and gradient norm."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return np.array([(line["loss"], line["grad_norm"]) for line in lines])


def assert_same_curve(one: np.ndarray, other: np.ndarray) -> None:
    difference = np.abs(one - other) / np.abs(other)
    assert difference.max() < 1e-5, f"{difference.max():.1e} at step {difference.argmax() // 2 + 1}"


@pytest.fixture(scope="module")
def reference(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """One process, undisturbed."""
    folder = tmp_path_factory.mktemp("reference")
    succeed(cloze_ranks(flags(prepared, folder / "run", 8), 1, "single", folder / "log", record(folder / "seen")))
    assert recorded_steps(folder / "seen") == expected_steps(prepared, SEED, BATCH, STEPS)
    return curve(folder / "run")


def move_about(prepared: Path, folder: Path, engines: list[str], seed: int, more: list[list[str]]) -> None:
    """Train in segments, the first three ended by SIGTERM to one rank at a random step."""
    rng = random.Random(seed)
    stops = sorted(rng.sample(range(1, STEPS - 1), len(WORLDS) - 1))
    for number, (world, engine) in enumerate(zip(WORLDS, engines, strict=True)):
        last = number == len(WORLDS) - 1
        disturb = None if last else stop_at(stops[number], rng.randrange(world))
        argv = flags(prepared, folder / "run", 4) + more[number]
        outcomes = cloze_ranks(argv, world, engine, folder / "log", record(folder / "seen", disturb))
        output = "\n".join(outcome.output for outcome in outcomes)
        assert [outcome.code for outcome in outcomes] == [0 if last else 75] * world, output
        if not last:
            at = stops[number] + 1
            assert f"SIGTERM: stopped after step {at}; checkpoint-{at} is saved" in output or "another rank" in output
            assert (folder / "run" / f"checkpoint-{at}").is_dir()
    assert recorded_steps(folder / "seen") == expected_steps(prepared, SEED, BATCH, STEPS)


@pytest.mark.parametrize("engine", ["ddp", "zero0", "zero1", "zero2", "zero3"])
def test_stopped_three_times_and_moved_from_2_ranks_to_1_to_3_to_2(prepared, tmp_path, reference, engine):
    move_about(prepared, tmp_path, [engine, "single" if engine == "ddp" else engine, engine, engine], 5, [[]] * 4)
    assert_same_curve(curve(tmp_path / "run"), reference)


@pytest.mark.parametrize(
    "engines",
    [["zero3", "single", "zero1", "ddp"], ["ddp", "zero3", "zero2", "zero0"], ["zero0", "zero2", "zero3", "zero1"]],
    ids="-".join,
)
def test_moved_between_engines_too(prepared, tmp_path, reference, engines):
    move_about(prepared, tmp_path, engines, 7, [[]] * 4)
    assert_same_curve(curve(tmp_path / "run"), reference)


@pytest.mark.parametrize("world_size", [2, 3])
def test_and_undisturbed_on_other_numbers_of_ranks(prepared, tmp_path, reference, world_size):
    """On 3 ranks the first step is taken by one: a new run has the batch that its flags give."""
    first = cloze_ranks(
        flags(prepared, tmp_path / "run", 8), 1, "single", tmp_path / "log", record(tmp_path / "seen", stop_at(0, 0))
    )
    assert first[0].code == 75
    succeed(
        cloze_ranks(
            flags(prepared, tmp_path / "run", 8), world_size, "ddp", tmp_path / "log", record(tmp_path / "seen")
        )
    )
    assert recorded_steps(tmp_path / "seen") == expected_steps(prepared, SEED, BATCH, STEPS)
    assert_same_curve(curve(tmp_path / "run"), reference)


VARIANTS = {
    "sgd": ["--optim", "sgd", "--optim_args", "momentum=0.9,nesterov=true", "--learning_rate", "0.1"],
    "rmsprop": ["--optim", "rmsprop", "--learning_rate", "1e-4"],
    "amsgrad": ["--optim_args", "amsgrad=true"],
    "frozen": ["--freeze", r".*(word_embeddings|layer\.0)"],
    "unused": ["--model_type", "fnet", "--config_overrides", FNET],
    "untied": ["--config_overrides", TINY_MODEL_NO_DROPOUT[3] + ",tie_word_embeddings=False"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_optimizers_and_parameters_that_are_frozen_unused_or_untied(prepared, tmp_path, variant):
    """One process against two ranks of ZeRO-2, one of ZeRO-3, three of DDP, two of ZeRO-1, with two decay groups."""
    more = VARIANTS[variant]
    succeed(cloze_ranks(flags(prepared, tmp_path / "one", 8) + more, 1, "single", tmp_path / "log"))
    move_about(prepared, tmp_path, ["zero2", "zero3", "ddp", "zero1"], 11, [more] * 4)
    assert_same_curve(curve(tmp_path / "run"), curve(tmp_path / "one"))
    manifest = read_manifest(tmp_path / "run" / f"checkpoint-{STEPS}")
    trained = [facts["trained"] for facts in manifest["parameters"].values()]
    # An untied roberta has a bias that its decoder does not use.
    assert all(trained) == (variant not in ("frozen", "unused", "untied"))


def test_offloaded_or_not(prepared: Path, tmp_path: Path, reference: np.ndarray):
    two, three = (["--deepspeed", f"ds_configs/zero{stage}_offload.json"] for stage in (2, 3))
    move_about(prepared, tmp_path, ["zero2", "zero3", "zero3", "zero1"], 13, [two, [], three, []])
    assert_same_curve(curve(tmp_path / "run"), reference)


def test_between_bf16_and_fp32(prepared: Path, tmp_path: Path, reference: np.ndarray):
    """Weights and moments move exactly; what is computed with them is rounded."""
    bf16 = ["--bf16"]
    move_about(prepared, tmp_path, ["zero1", "zero3", "ddp", "zero2"], 17, [bf16, bf16, [], bf16])
    assert np.abs(curve(tmp_path / "run")[:, 0] / reference[:, 0] - 1).max() < 2e-2
