"""Launches that silently train something else are refused: each is provoked for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import TINY_MODEL

ROOT = Path(__file__).resolve().parents[2]
CHECK = """
import os, sys
from pathlib import Path
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from accelerate import Accelerator
from cloze.command_line import leave
from cloze.distributed import check_world, read_launcher
from cloze.errors import LaunchError
accelerator = Accelerator()          # as most scripts do it: on the CPU every rank believes to be alone
try:
    check_world(accelerator, read_launcher())
except LaunchError as error:
    Path(sys.argv[1], str(os.getpid())).write_text(str(error))  # standard output is shared: lines of two ranks can mix
leave(0)
"""


def launch(launcher: list[str], script: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--main_process_port", "0", *script]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # accelerate looks for `deepspeed` there
    env = os.environ | {"PATH": path} | environment
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)


def train(prepared: Path, output: Path) -> list[str]:
    flags = [*TINY_MODEL, "--max_steps", "1", "--dataset_name", str(prepared), "--output_dir", str(output)]
    return ["-m", "cloze", "train", *flags]


DEEPSPEED = ["--use_deepspeed", "--zero_stage", "1", "--dynamo_backend", "no", "--mixed_precision", "no"]


def test_ranks_that_each_believe_to_be_alone_are_noticed(tmp_path: Path):
    script = tmp_path / "check.py"
    script.write_text(CHECK)
    refusals = tmp_path / "refusals"
    refusals.mkdir()
    done = launch([*DEEPSPEED, "--num_processes", "2", "--num_machines", "1"], [str(script), str(refusals)])
    lines = [file.read_text() for file in refusals.iterdir()]
    assert len(lines) == 2, done.stdout + done.stderr
    assert all("accelerate sees 1 processes, but 2 were started" in line for line in lines), lines


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
    launcher = [*DEEPSPEED, "--num_processes", "2", "--num_machines", "1"]
    script = tmp_path / "with_cpu.py"
    script.write_text(
        "import os, sys\nos.environ['ACCELERATE_USE_CPU'] = 'true'\nfrom cloze.cli import main\nmain(sys.argv[1:])\n"
    )
    done = launch(launcher, [str(script), *train(prepared, tmp_path / "run")[2:]])
    assert done.returncode != 0
    assert "would silently drop DeepSpeed" in done.stderr
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
