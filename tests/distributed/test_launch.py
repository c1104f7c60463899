"""Launches that silently train something else are refused: each is provoked for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from ranks import cloze_ranks, run_ranks, succeed
from repository import ROOT

from cloze.errors import LaunchError


def launch(launcher: list[str], script: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--main_process_port", "0", *script]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # accelerate looks for `deepspeed` there
    env = os.environ | {"PATH": path} | environment
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)


def train(prepared: Path, output: Path) -> list[str]:
    flags = [*TINY_MODEL, "--max_steps", "1", "--dataset_name", str(prepared), "--output_dir", str(output)]
    return ["-m", "cloze", "train", *flags]


DEEPSPEED = ["--use_deepspeed", "--zero_stage", "1", "--dynamo_backend", "no", "--mixed_precision", "no"]


def check_alone() -> None:
    """Make an Accelerator as most scripts do: with DeepSpeed on a CPU every rank believes that it is alone."""
    import deepspeed
    from accelerate import Accelerator

    from cloze.cli.command_line import leave
    from cloze.distributed.launch_check import check_world, read_launcher

    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with pytest.raises(LaunchError, match="accelerate sees 1 processes, but 2 were started"):
        check_world(Accelerator(), read_launcher())
    leave(0)


def test_ranks_that_each_believe_to_be_alone_are_noticed(tmp_path: Path):
    succeed(run_ranks(check_alone, 2, tmp_path))


def test_an_error_of_all_ranks_is_told_though_rank_0_comes_last(tmp_path: Path):
    """The launcher ends rank 0 as soon as another has ended: the line must be out by then."""
    script = tmp_path / "late.py"
    script.write_text(
        "import os, sys, time\nfrom cloze.cli import main\ntime.sleep(1.0 if os.environ['RANK'] == '0' else 0.0)\n"
        "main(sys.argv[1:])\n"
    )
    launcher = [*DEEPSPEED, "--num_processes", "2", "--num_machines", "1"]
    done = launch(launcher, [str(script), "train", "--mask_unitt", "word"])
    assert done.stderr.count("unknown option mask_unitt; did you mean mask_unit?") == 1, done.stderr
    assert "cloze: SIGTERM" not in done.stderr


def test_deepspeed_that_would_be_dropped_is_refused(prepared: Path, tmp_path: Path):
    argv = train(prepared, tmp_path / "run")[2:]
    use_cpu = {"ACCELERATE_USE_CPU": "true"}
    outcomes = cloze_ranks(argv, 2, "zero1", tmp_path / "log", before=lambda: os.environ.update(use_cpu))
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert "both the CPU and DeepSpeed" in outcomes[0].output
    assert not (tmp_path / "run").exists()


TWO = ["--num_processes", "2", "--num_machines", "2", "--machine_rank", "0"]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([*DEEPSPEED, *TWO], id="deepspeed-without-hostfile", marks=pytest.mark.slow),
        pytest.param(["--cpu", *TWO], id="cpu"),
    ],
)
def test_two_worlds_of_one_process_are_refused(prepared: Path, tmp_path: Path, launcher: list[str]):
    done = launch([*launcher, "--main_process_ip", "127.0.0.1"], train(prepared, tmp_path / "run"))
    assert "2 processes on 2 machines were launched, but this world has 1" in done.stderr, done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_zero3_starts_from_the_same_weights_whatever_its_settings_say(prepared: Path, tmp_path: Path):
    """accelerate's zero3_init_flag makes transformers draw other weights for the same seed."""
    perplexities = set()
    for number, launcher in enumerate(
        (
            ["--use_deepspeed", "--zero_stage", "3", "--zero3_init_flag", "true"],
            ["--use_deepspeed", "--zero_stage", "3", "--zero3_init_flag", "false"],
            ["--use_deepspeed", "--zero_stage", "1"],
        )
    ):
        launcher += [
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
        ]
        script = [*train(prepared, tmp_path / f"run-{number}"), "--eval_on_start", "--save_strategy", "no"]
        done = launch(launcher, script)
        assert done.returncode == 0, done.stdout + done.stderr
        line = next(line for line in done.stdout.splitlines() if "step 0: perplexity" in line)
        perplexities.add(line.split("perplexity")[1].split(",")[0].strip())
    assert len(perplexities) == 1
