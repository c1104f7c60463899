"""The moving average is that of the weights of every step, whichever engine held them, and it can be consolidated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from corpus import TINY_MODEL
from poison import poison
from ranks import ENGINES, cloze_ranks, succeed
from recording import record, stop_at
from transformers import AutoModelForMaskedLM

from cloze.checkpoint.format import read_manifest
from cloze.checkpoint.reader import PieceReader
from cloze.cli.commands import consolidate
from cloze.config import ConsolidateConfig, TrainConfig
from cloze.errors import ConfigError
from cloze.model.load import build_model

STEPS, DECAY = 8, 0.6  # from step 5 on, (1 + step) / (10 + step) is larger
REFUSED = (0, 3)
FLAGS = [*TINY_MODEL, "--max_steps", str(STEPS), "--save_steps", "1", "--learning_rate", "1e-2", "--warmup_steps", "0"]
FLAGS += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--on_nonfinite", "skip"]
FLAGS += ["--ema_decay", str(DECAY)]


def disturbed(folder: Path, stop: int | None) -> Callable[[], None]:
    """In a rank: two steps are refused, and one rank is told to stop before step `stop`."""

    def install() -> None:
        poison(steps=REFUSED, rank=0)()
        record(folder, None if stop is None else stop_at(stop, 0))()

    return install


def expected_averages(prepared: Path, run: Path) -> list[dict[str, torch.Tensor]]:
    """After each step, in float64, from the initial weights and those in the checkpoints of all steps."""
    config = TrainConfig(
        dataset_name=str(prepared), output_dir="", model_type="roberta", config_overrides=TINY_MODEL[3]
    )
    model, _ = build_model(config, prepared / "tokenizer", 32, config.seed)
    average = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    found = []
    for step in range(STEPS):
        weights = stored(run, step + 1, "weight")
        decay = min(DECAY, (1 + step) / (10 + step))
        if step not in REFUSED:
            average = {name: decay * a + (1 - decay) * weights[name].double() for name, a in average.items()}
        found.append(average)
    return found


def stored(run: Path, step: int, key: str) -> dict[str, torch.Tensor]:
    folder = run / f"checkpoint-{step}"
    manifest = read_manifest(folder)
    with PieceReader(folder, manifest) as pieces:
        shapes = {name: facts["shape"] for name, facts in manifest["parameters"].items()}
        return {name: pieces.read(name, key).view(shape).clone() for name, shape in shapes.items()}


def assert_averages(prepared: Path, run: Path, first: int = 1) -> float:
    """All checkpoints from step `first` on hold the average; the largest relative difference."""
    worst = 0.0
    for step, expected in enumerate(expected_averages(prepared, run), 1):
        if step < first:
            continue
        for name, average in stored(run, step, "ema").items():
            difference = (average.double() - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-3)
            worst = max(worst, float(difference))
            assert difference < 1e-6, f"{name} after step {step}: {difference:.1e}"
    return worst


@pytest.fixture(scope="module")
def moved(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that began on 2 ranks of ZeRO-3, went on without DeepSpeed on one, and ended on 3 of ZeRO-2."""
    folder = tmp_path_factory.mktemp("moved")
    argv = ["train", *FLAGS, "--dataset_name", str(prepared), "--output_dir", str(folder / "run")]
    for engine, world_size, stop in (("zero3", 2, 2), ("single", 1, 4), ("zero2", 3, None)):
        before = disturbed(folder / "seen", stop)
        outcomes = cloze_ranks([*argv, "--resume_from_checkpoint", "auto"], world_size, engine, folder / "log", before)
        assert {outcome.code for outcome in outcomes} == {0 if stop is None else 75}, outcomes[0].output
    return folder / "run"


def test_the_average_follows_the_weights_through_stops_moves_and_refused_steps(prepared, moved, figure):
    figure("moving average against one computed from all steps' weights: relative difference",
           assert_averages(prepared, moved, first=2))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", *(f"{e}{p}" for e in ENGINES if e != "ddp" for p in ("", "-bf16"))])
def test_every_engine_keeps_the_average(prepared: Path, tmp_path: Path, engine: str):
    name, _, bf16 = engine.partition("-")
    argv = ["train", *FLAGS, "--dataset_name", str(prepared), "--output_dir", str(tmp_path / "run")]
    argv += ["--bf16"] if bf16 else []
    succeed(cloze_ranks(argv, 2, name, tmp_path / "log", disturbed(tmp_path / "seen", None)))
    assert_averages(prepared, tmp_path / "run", first=2)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["sgd", "rmsprop"])
def test_other_optimizers_keep_it_too(prepared: Path, tmp_path: Path, optim: str):
    argv = ["train", *FLAGS, "--optim", optim, "--dataset_name", str(prepared), "--output_dir", str(tmp_path / "run")]
    succeed(cloze_ranks(argv, 2, "ddp", tmp_path / "log", disturbed(tmp_path / "seen", None)))
    assert_averages(prepared, tmp_path / "run", first=2)


def test_the_average_is_consolidated_on_demand(prepared: Path, moved: Path, tmp_path: Path, capsys):
    for weights in ("trained", "ema"):
        consolidate.run(ConsolidateConfig(checkpoint=str(moved), output=str(tmp_path / weights), weights=weights))
    said = capsys.readouterr()
    assert "an average has no logits to compare with: loss" in said.out + said.err
    expected = stored(moved, STEPS, "ema")
    trained, average = (AutoModelForMaskedLM.from_pretrained(tmp_path / w).state_dict() for w in ("trained", "ema"))
    assert all(torch.equal(average[name], tensor) for name, tensor in expected.items())
    assert not all(torch.equal(average[name], trained[name]) for name in expected)


def test_a_run_without_an_average_has_none_to_consolidate(prepared: Path, tmp_path: Path):
    argv = ["train", *TINY_MODEL, "--max_steps", "1", "--dataset_name", str(prepared)]
    succeed(cloze_ranks([*argv, "--output_dir", str(tmp_path / "run")], 1, "single", tmp_path / "log"))
    with pytest.raises(ConfigError, match="no moving average"):
        consolidate.run(ConsolidateConfig(checkpoint=str(tmp_path / "run"), weights="ema"))
    assert not (tmp_path / "run" / "model").exists()
