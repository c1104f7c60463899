"""Losses and gradients that are no numbers: never in the weights, always with their samples named."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import weights_of
from corpus import TINY_MODEL
from poison import BAD, poison
from ranks import ENGINES, Outcome, cloze_ranks, succeed

from cloze.errors import CheckpointError
from cloze.tools.inspect.replay import rebuild
from cloze.training.nonfinite import excluded_steps, steps_to_leave_out

FLAGS = [*TINY_MODEL, "--max_steps", "8", "--save_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-3"]
FLAGS += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
FEWER = ["ddp", *(pytest.param(e, marks=pytest.mark.slow) for e in ("zero0", "zero1", "zero2", "fsdp2")), "zero3"]
SLOW = [(engine, "fp32") for engine in ("zero0", "zero1", "zero2", "zero3", "fsdp2")]
SLOW += [(engine, "bf16") for engine in ENGINES if engine != "zero3"]


def train(
    prepared: Path, folder: Path, engine: str, on_nonfinite: str, before: Callable[[], None] | None, *more: str
) -> list[Outcome]:
    where = ["--dataset_name", str(prepared), "--output_dir", str(folder / "run"), "--on_nonfinite", on_nonfinite]
    return cloze_ranks(["train", *FLAGS, *where, *more], 2, engine, folder / "log", before)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        pytest.param(engine, precision, marks=pytest.mark.slow if (engine, precision) in SLOW else ())
        for engine in ENGINES
        for precision in ("fp32", "bf16")
    ],
)
def test_stop_names_step_samples_and_rank_and_keeps_the_state_before(prepared, tmp_path, engine, precision):
    more = ["--bf16"] if precision == "bf16" else []
    outcomes = train(prepared, tmp_path, engine, "stop", poison(), *more)
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes[0].output + outcomes[1].output
    lines = (outcomes[0].output + outcomes[1].output).splitlines()
    told = [line for line in lines if "cloze: error: " in line]  # by the rank that had it first
    assert len(told) == 1
    # 8 samples a step: the second micro-batch of rank 1 holds the last two.
    assert f"loss is nan at step {BAD + 1} (rank 1, samples 38-39)" in told[0]
    assert f"`cloze replay {tmp_path}/run --step {BAD + 1}`" in told[0]
    assert "Traceback" not in outcomes[0].output + outcomes[1].output
    assert rebuild(tmp_path / "run", BAD + 1).samples.tolist() == list(range(32, 40))
    succeed(train(prepared, tmp_path, engine, "stop", None, "--resume_from_checkpoint", "auto", *more))
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, 9))
    whole = tmp_path / "whole"
    succeed(train(prepared, whole, engine, "stop", None, *more))
    for name, value in weights_of(whole / "run" / "checkpoint-8").items():
        assert torch.equal(value, weights_of(tmp_path / "run" / "checkpoint-8")[name]), name


@pytest.mark.parametrize("engine", FEWER)
def test_a_gradient_that_is_no_number_is_found_where_the_loss_is_one(prepared, tmp_path, engine):
    outcomes = train(prepared, tmp_path, engine, "stop", poison("gradient"))
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes[0].output
    assert f"at step {BAD + 1} (samples 32-39)" in outcomes[0].output
    assert "gradient norm is" in outcomes[0].output


@pytest.mark.parametrize("engine", FEWER)
def test_skip_goes_on_without_the_batch(prepared, tmp_path, engine):
    outcomes = train(prepared, tmp_path, engine, "skip", poison(value=math.inf))
    succeed(outcomes)
    assert f"loss is inf at step {BAD + 1} (rank 1, samples 38-39); the batch is skipped" in outcomes[0].output
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines if line.get("skipped")] == [BAD + 1]
    assert all(math.isfinite(line["loss"]) for line in lines if line.get("loss") is not None)
    weights = weights_of(tmp_path / "run" / "checkpoint-8")
    assert all(torch.isfinite(value).all() for value in weights.values())


def leaving_out(*steps: int) -> Callable[[], None]:
    """To be called in a rank: a new run leaves these steps (0-based) out."""

    def install() -> None:
        from cloze.training import setup

        setup.steps_to_leave_out = lambda *_: list(steps)

    return install


@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(e, marks=pytest.mark.slow) for e in ("zero2", "zero3"))])
def test_rollback_goes_back_and_leaves_the_batch_out(prepared, tmp_path, engine):
    """As if that batch had been left out from the beginning, also after a second fall and a restart."""
    outcomes = train(prepared, tmp_path / "a", engine, "rollback", poison(steps=(BAD, 6)))
    succeed(outcomes)
    assert f"loss is nan at step {BAD + 1} (rank 1, samples 38-39); back to checkpoint-3" in outcomes[0].output
    assert "loss is nan at step 7 (rank 1, samples 54-55); back to checkpoint-6" in outcomes[0].output
    assert json.loads((tmp_path / "a" / "run" / "left_out.json").read_text()) == [BAD, 6]
    assert rebuild(tmp_path / "a" / "run", BAD + 1).excluded
    succeed(train(prepared, tmp_path / "b", engine, "rollback", leaving_out(BAD, 6)))
    one, other = (weights_of(tmp_path / name / "run" / "checkpoint-8") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    steps = [line["step"] for line in lines_of(tmp_path / "a")]
    assert steps == list(range(1, 9))


def test_rollback_without_a_checkpoint_says_so(prepared, tmp_path):
    outcomes = train(prepared, tmp_path, "ddp", "rollback", poison(steps=(1,)))
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert "no checkpoint to return to" in outcomes[0].output


def test_steps_that_an_earlier_run_left_out_are_forgotten_by_a_new_run(tmp_path):
    file = tmp_path / "left_out.json"
    file.write_text("[0, 1]")
    assert steps_to_leave_out(tmp_path, tmp_path / "checkpoint-3") == [0, 1]
    assert steps_to_leave_out(tmp_path, tmp_path / "other" / "checkpoint-3") == []
    assert not file.exists()
    file.write_text("[0, 1]")
    assert steps_to_leave_out(tmp_path, None) == []
    assert not file.exists()


@pytest.mark.parametrize("text", ["[0, -1]", "[1.0]", '["1"]', "{}", "[0"])
def test_a_file_that_is_no_list_of_steps_is_refused(tmp_path, text: str):
    (tmp_path / "left_out.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"left_out\.json: "):
        steps_to_leave_out(tmp_path, tmp_path / "checkpoint-3")


def only_rank_0_sees_files() -> None:
    """To be called in a rank: another rank's cache of the shared disk does not show left_out.json."""
    from cloze.utils import run_files

    if os.environ["RANK"] != "0":
        run_files.EXCLUDED_STEPS = "unseen.json"


def test_all_ranks_leave_out_what_rank_0_does(prepared, tmp_path):
    """On several hosts each reads a shared disk through a cache of its own."""

    def before() -> None:
        only_rank_0_sees_files()
        poison()()

    succeed(train(prepared, tmp_path, "ddp", "rollback", before))
    resumed = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-3")]
    succeed(train(prepared, tmp_path, "ddp", "rollback", only_rank_0_sees_files, *resumed))
    assert [line["step"] for line in lines_of(tmp_path) if line.get("left_out")] == [BAD + 1]


def test_a_damaged_list_of_steps_is_refused(tmp_path):
    (tmp_path / "left_out.json").write_text('["a"]')
    with pytest.raises(CheckpointError, match="not a list of steps"):
        excluded_steps(tmp_path)


def test_skipping_every_step_ends_the_run(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("cloze.training.step_actions.MOST_SKIPPED", 5)
    outcomes = train(prepared, tmp_path, "ddp", "skip", poison("gradient", steps=tuple(range(2, 8))))
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert "5 steps in a row were skipped" in outcomes[0].output + outcomes[1].output
    assert [line["step"] for line in lines_of(tmp_path) if line.get("skipped")] == [3, 4, 5, 6]


def in_fp16(scale: float) -> Callable[[], None]:
    """To be called in a rank: torch's own loss scaling, which a CPU has too; and a gradient that is never finite."""

    def install() -> None:
        from cloze.training.engines.ddp import DDPEngine

        plain = DDPEngine.prepare

        def prepare(*arguments):
            engine = plain(*arguments)
            engine.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            engine.accelerator.state._mixed_precision = "fp16"
            engine.deferred = False
            return engine

        DDPEngine.prepare = prepare
        poison("gradient", steps=tuple(range(8)), rank=0)()

    return install


def test_a_loss_scale_that_never_helps_is_reported_and_ends_the_run(prepared, tmp_path):
    where = ["--dataset_name", str(prepared), "--output_dir", str(tmp_path / "run"), "--on_nonfinite", "stop"]
    outcome = cloze_ranks(["train", *FLAGS, *where], 1, "single", tmp_path / "log", in_fp16(16.0))[0]
    assert outcome.code == 2, outcome.output
    told = [line for line in outcome.output.splitlines() if "with finite losses" in line]
    assert len(told) == 2, outcome.output
    assert "at step 1 with finite losses, at a loss scale of 8: the step is skipped" in told[0]
    assert "at step 5 with finite losses, at a loss scale of 0.5" in told[1]
