"""What a launcher's environment says does not change a run behind its options."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from ranks import cloze_ranks, run_ranks, succeed

from cloze.cli import main
from cloze.utils.environment.processes import RANK_VARIABLES


def setting(**variables: str) -> Callable[[], None]:
    """To be called in a rank: set variables as a launcher, or its configuration file, does."""

    def act() -> None:
        os.environ.update(variables)

    return act


def train(prepared: Path, run: Path, *flags: str) -> list[str]:
    where = ["--dataset_name", str(prepared), "--output_dir", str(run), "--per_device_train_batch_size", "2"]
    return ["train", *TINY_MODEL, "--max_steps", "2", "--save_steps", "2", "--logging_steps", "1", *where, *flags]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_settings_of_a_launcher_leave_losses_and_names_of_a_run_as_its_options_say(prepared: Path, tmp_path: Path):
    succeed(cloze_ranks(train(prepared, tmp_path / "usual"), 1, "single", tmp_path / "logs"))
    act = setting(
        ACCELERATE_DYNAMO_BACKEND="EAGER",
        ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION="true",
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4",
        ACCELERATE_GRADIENT_CLIPPING="0.001",
    )
    outcomes = cloze_ranks(train(prepared, tmp_path / "other"), 1, "single", tmp_path / "more", before=act)
    succeed(outcomes)
    for name in ("DYNAMO_BACKEND", "GRADIENT_ACCUMULATION_STEPS", "GRADIENT_CLIPPING"):
        assert outcomes[0].output.count(f"ACCELERATE_{name}=") == 1
    assert losses(tmp_path / "other") == losses(tmp_path / "usual")
    stored = [json.loads((tmp_path / run / "checkpoint-2/checkpoint.json").read_text()) for run in ("usual", "other")]
    assert stored[0]["parameters"].keys() == stored[1]["parameters"].keys()
    assert [piece["sum"] for piece in stored[0]["pieces"]] == [piece["sum"] for piece in stored[1]["pieces"]]


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "no launcher joins them"),
    ],
    ids=["WORLD_SIZE", "SLURM"],
)
def test_one_of_several_processes_that_nothing_joins_is_refused_before_anything_is_made(
    prepared: Path, tmp_path: Path, variables: dict[str, str], says: str
):
    def enter() -> None:
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(variables)
        main(train(prepared, tmp_path / "run"))

    outcomes = run_ranks(enter, 1, tmp_path / "logs")
    assert outcomes[0].code == 2
    assert [line for line in outcomes[0].output.splitlines() if says in line] == outcomes[0].output.splitlines()
    assert not (tmp_path / "run").exists()


def test_a_launcher_of_one_process_need_not_say_where_it_is_met(prepared: Path, tmp_path: Path):
    def enter() -> None:
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        main(train(prepared, tmp_path / "run"))

    succeed(run_ranks(enter, 1, tmp_path / "logs"))
