"""One run, moved between numbers of processes and engines, stopped in between: the same curve, the same samples."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from corpus import TINY_MODEL_NO_DROPOUT, make_prepared
from ranks import cloze_ranks, succeed
from recording import expected_steps, record, recorded_steps, stop_at

from cloze.checkpoint.format import read_manifest
from cloze.data.prepared.shards import open_prepared

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


def assert_same_curve(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest relative difference of the loss."""
    difference = np.abs(one - other) / np.abs(other)
    assert difference.max() < 1e-5, f"{difference.max():.1e} at step {difference.argmax() // 2 + 1}"
    return float(difference[:, 0].max())


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


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "engine",
    ["ddp", *(pytest.param(e, marks=SLOW) for e in ("zero0", "zero1", "fsdp2")), "zero2", "zero3"],
)
def test_stopped_three_times_and_moved_from_2_ranks_to_1_to_3_to_2(prepared, tmp_path, reference, engine, figure):
    move_about(prepared, tmp_path, [engine, "single" if engine == "ddp" else engine, engine, engine], 5, [[]] * 4)
    difference = assert_same_curve(curve(tmp_path / "run"), reference)
    figure(f"{engine}: stopped 3 times, 2 -> 1 -> 3 -> 2 ranks: difference of loss", difference)


@pytest.mark.parametrize(
    "engines",
    [
        ["zero3", "single", "fsdp2", "ddp"],
        pytest.param(["zero3", "single", "zero1", "ddp"], marks=SLOW),
        pytest.param(["fsdp2", "zero3", "fsdp2", "zero2"], marks=SLOW),
        pytest.param(["ddp", "fsdp2", "zero1", "fsdp2"], marks=SLOW),
        pytest.param(["ddp", "zero3", "zero2", "zero0"], marks=SLOW),
        pytest.param(["zero0", "zero2", "zero3", "zero1"], marks=SLOW),
    ],
    ids="-".join,
)
def test_moved_between_engines_too(prepared, tmp_path, reference, engines, figure):
    move_about(prepared, tmp_path, engines, 7, [[]] * 4)
    difference = assert_same_curve(curve(tmp_path / "run"), reference)
    figure("stopped 3 times, moved between engines and ranks: difference of loss", difference)


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
    "amsgrad": ["--optim_args", "amsgrad=true"],
    "unused": ["--model_type", "fnet", "--config_overrides", FNET],
    "untied": ["--config_overrides", TINY_MODEL_NO_DROPOUT[3] + ",tie_word_embeddings=False"],
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_another_optimizer_and_parameters_that_are_unused_or_untied(prepared, tmp_path, variant):
    """One process against two ranks of ZeRO-2, one of ZeRO-3, three of DDP, two of ZeRO-1, with two decay groups."""
    more = VARIANTS[variant]
    succeed(cloze_ranks(flags(prepared, tmp_path / "one", 8) + more, 1, "single", tmp_path / "log"))
    move_about(prepared, tmp_path, ["zero2", "zero3", "ddp", "zero1"], 11, [more] * 4)
    assert_same_curve(curve(tmp_path / "run"), curve(tmp_path / "one"))
    manifest = read_manifest(tmp_path / "run" / f"checkpoint-{STEPS}")
    trained = [facts["trained"] for facts in manifest["parameters"].values()]
    # An untied roberta has a bias that its decoder does not use.
    assert all(trained) == (variant == "amsgrad")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose number of blocks nothing divides."""
    prepared = make_prepared(tmp_path_factory.mktemp("odd"), num_threads=140)
    blocks = len(open_prepared(prepared).blocks("train"))
    assert all(blocks % n for n in (2, 3, 5, 7, 8))
    return prepared


@pytest.mark.slow
def test_twenty_interruptions_in_three_epochs_lose_and_double_nothing(odd: Path, tmp_path: Path, figure):
    """Every sample of three epochs exactly once in what was kept, with the one mask it has; the same curve."""
    blocks, rng = len(open_prepared(odd).blocks("train")), random.Random(20)
    total, steps = 3 * blocks, -(-3 * blocks // BATCH)
    argv = ["train", *TINY_MODEL_NO_DROPOUT, "--num_train_epochs", "3", "--logging_steps", "1", "--seed", str(SEED)]
    argv += ["--save_strategy", "epoch", "--save_total_limit", "2", "--learning_rate", "1e-3", "--dataset_name"]
    argv += [str(odd), "--resume_from_checkpoint", "auto", "--per_device_train_batch_size", "8"]
    succeed(cloze_ranks([*argv, "--output_dir", str(tmp_path / "whole")], 1, "single", tmp_path / "log"))
    stops = sorted(rng.sample(range(steps - 1), 20))
    argv += ["--output_dir", str(tmp_path / "run")]
    for stop in [*stops, None]:
        world = 1 if stop == stops[0] else rng.choice((1, 2, 3))  # the first start decides the global batch
        engine = rng.choice(("ddp", "zero1", "zero2", "zero3")) if world > 1 else "single"
        disturb = None if stop is None else stop_at(stop, rng.randrange(world))
        outcomes = cloze_ranks(argv, world, engine, tmp_path / "log", record(tmp_path / "seen", disturb))
        assert [outcome.code for outcome in outcomes] == [0 if stop is None else 75] * world, outcomes[0].output
    seen = recorded_steps(tmp_path / "seen")
    assert seen == expected_steps(odd, SEED, BATCH, steps, total)
    times = np.bincount([s for samples in seen.values() for s in samples if s < total], minlength=total)
    assert (times == 1).all()
    assert len(times) == total
    losses = [[line["loss"] for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())]
              for name in ("run", "whole")]  # fmt: skip
    assert len(losses[0]) == len(losses[1]) == steps
    difference = np.abs(np.divide(*losses) - 1).max()
    assert difference < 1e-5
    figure("stopped 20 times in 3 epochs, at random on 1 to 3 ranks of any engine: difference of loss", difference)


def test_offloaded_or_not(prepared: Path, tmp_path: Path, reference: np.ndarray):
    two, three = (["--deepspeed", f"ds_configs/zero{stage}_offload.json"] for stage in (2, 3))
    move_about(prepared, tmp_path, ["zero2", "zero3", "zero3", "zero1"], 13, [two, [], three, []])
    assert_same_curve(curve(tmp_path / "run"), reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engines", [["zero1", "zero3", "ddp", "zero2"], ["fsdp2", "fsdp2", "zero3", "fsdp2"]], ids="-".join
)
def test_between_bf16_and_fp32(prepared: Path, tmp_path: Path, reference: np.ndarray, engines: list[str]):
    """Weights and moments move exactly; what is computed with them is rounded."""
    bf16 = ["--bf16"]
    move_about(prepared, tmp_path, engines, 17, [bf16, bf16, [], bf16])
    assert np.abs(curve(tmp_path / "run")[:, 0] / reference[:, 0] - 1).max() < 2e-2
