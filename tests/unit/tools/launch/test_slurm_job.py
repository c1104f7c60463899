"""What is submitted to SLURM, and when a job gives up. `sbatch` is a stand-in here; tests/cluster has the real one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from repository import ROOT

from cloze.cli.commands import submit
from cloze.config.parser import parse
from cloze.errors import ClozeError, LaunchError
from cloze.tools.launch.slurm_job import count_start, main, newest_step

RECIPE = "launch/recipes/roberta-eli5-full.yaml"
SBATCH = """#!/bin/sh
printf '%s\\n' "$*" >> calls
case "$*" in
*"job-name=cloze-${REFUSED:-nothing}"*) echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1 ;;
esac
wc -l < calls
"""


def checkpoint(run: Path, step: int) -> None:
    (run / f"checkpoint-{step}").mkdir(parents=True)


def test_a_run_gives_up_after_restarts_without_a_new_checkpoint_and_not_before(tmp_path: Path):
    run = tmp_path / "run"
    assert [count_start(run, 2) for _ in range(4)] == [True, True, True, False]
    assert count_start(run, 2), "submitted again by a person, it begins anew"
    for step in range(10, 60, 10):
        checkpoint(run, step)
        assert [count_start(run, 2) for _ in range(3)] == [True, True, True], "each checkpoint is progress"
    assert not count_start(run, 2)


def test_only_whole_checkpoints_are_progress(tmp_path: Path):
    checkpoint(tmp_path, 5)
    (tmp_path / "checkpoint-7.tmp").mkdir()
    assert newest_step(tmp_path) == 5
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "starts.json").write_text("not json")
    assert count_start(tmp_path, 0)
    assert not count_start(tmp_path, 0)


def test_a_job_asks_for_its_run_with_the_flags_of_training(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("dataset_name: blocks\noutput_dir: runs/x\n")
    assert main(["folder", "--config", "r.yaml"]) == 0
    assert main(["start", "--max_restarts", "0", "--config", "r.yaml", "--output_dir", "runs/y"]) == 0
    assert main(["batch", "--processes", "16", "--config", "r.yaml", "--gradient_accumulation_steps", "3"]) == 0
    assert main(["batch", "--processes", "16", "--config", "r.yaml", "--global_batch_size", "100"]) == 0
    assert capsys.readouterr().out == "runs/x\nruns/y\n384\n100\n"
    assert main(["start", "--max_restarts", "0", "--config", "r.yaml", "--output_dir", "runs/y"]) == 1
    assert "1 starts ended without a checkpoint" in capsys.readouterr().err
    assert main(["start", "--max_restarts", "0", "--config", "r.yaml", "--max_stepz", "3"]) == 2
    assert "did you mean max_steps?" in capsys.readouterr().err


@pytest.fixture
def login_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the repository's root is, with an `sbatch` that notes what it is called with."""
    for name in ("launch", "ds_configs", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("sbatch", "scancel"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(SBATCH)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls(folder: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]


def test_each_job_waits_for_the_one_before_and_is_cancelled_where_that_fails(login_node: Path, capsys):
    words = ["submit", RECIPE, "--nodes", "4", "--min_nodes", "2", "--gpus_per_node", "8", "--partition", "gpu"]
    words += [
        "--account",
        "me",
        "--time",
        "2-0",
        "--push_to",
        "me/x",
        "--prepare_tasks",
        "16",
        "--cpu_partition",
        "cpu",
    ]
    words += ["--prepare_tasks_at_once", "4", "--train_flags", "--max_steps 7", "--sbatch_flags", "--qos=high"]
    submit.run(parse(words)[1])
    prepare, join, train, evaluate, push = calls(login_node)
    assert {"--array=0-15%4", "--partition=cpu", "--account=me", "--qos=high"} <= set(prepare)
    for before, job in enumerate((join, train, evaluate, push), 1):
        assert {f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"} <= set(job)
    assert {"--nodes=2-4", "--gpus-per-node=8", "--partition=gpu", "--time=2-0"} <= set(train)
    assert any(word.startswith("--export=ALL,") and "FULL_NODES=4" in word for word in train)
    assert train[-4:] == ["slurm/train.sbatch", RECIPE, "--max_steps", "7"]
    assert evaluate[-3:] == ["slurm/evaluate.sbatch", "runs/roberta-eli5-full", "prepared/roberta-eli5-full"]
    assert push[-3:] == ["slurm/push.sbatch", "runs/roberta-eli5-full", "me/x"]
    assert join[-3:] == ["--num_shards", "16", "--finalize"]
    assert "scancel 1 2 3 4 5" in capsys.readouterr().out


def test_seeds_are_an_array_whose_tasks_wait_for_each_other(login_node: Path):
    submit.run(parse(["submit", RECIPE, "--seeds", "5"])[1])
    _, _, train, evaluate = calls(login_node)
    assert "--array=1-5" in train
    assert {"--array=1-5", "--dependency=aftercorr:3"} <= set(evaluate)


def test_the_job_that_pushes_runs_in_the_partition_of_those_that_prepare(login_node: Path):
    submit.run(parse(["submit", RECIPE, "--partition", "gpu", "--push_to", "me/x"])[1])
    assert all("--partition=gpu" in job for job in calls(login_node))


def test_where_sbatch_refuses_a_job_those_before_it_are_cancelled(login_node: Path, monkeypatch):
    monkeypatch.setenv("REFUSED", "train")
    with pytest.raises(LaunchError, match=r"train: .*partition.*gpu"):
        submit.run(parse(["submit", RECIPE])[1])
    assert calls(login_node)[-1] == ["1", "2"]


def test_blocks_that_are_there_are_not_prepared_again(login_node: Path, capsys):
    folder = login_node / "prepared" / "roberta-eli5-full"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    submit.run(parse(["submit", RECIPE])[1])
    assert [next(word for word in call if "job-name" in word) for call in calls(login_node)] == [
        "--job-name=cloze-train",
        "--job-name=cloze-evaluate",
    ]
    assert "is prepared already: no job prepares" in capsys.readouterr().out


def test_a_dry_run_submits_nothing_and_shows_every_script(login_node: Path, capsys):
    done = subprocess.run(["bash", str(ROOT / "slurm" / "submit"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "prepare (an array) -> train" in " ".join(done.stdout.split())
    submit.run(parse(["submit", RECIPE, "--dry_run"])[1])
    shown = capsys.readouterr().out
    assert not (login_node / "calls").exists()
    assert re.findall(r"^### (\S+)$", shown, re.MULTILINE) == [
        f"slurm/{name}.sbatch" for name in ("prepare", "train", "evaluate")
    ]
    assert shown.count("dry run      sbatch --parsable") == 4


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["no.yaml"], "no.yaml: no such file; submit from the repository root"),
        ([RECIPE, "--nodes", "0"], "--nodes: must be at least 1"),
        ([RECIPE, "--min_nodes", "2"], "--min_nodes: must not be above --nodes"),
        ([RECIPE, "--time", "tomorrow"], "--time: 'tomorrow' is not a time"),
        ([RECIPE, "--train_flags", "--max_stepz 3"], "unknown option max_stepz"),
        ([RECIPE, "--train_flags", "--dataset_name other"], "trains on other, but"),
        ([RECIPE, "--prepare_flags", "--dataset_name no/corpus.jsonl"], "no/corpus.jsonl: no such file or folder"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_submitted(login_node: Path, words: list[str], problem: str):
    with pytest.raises(ClozeError, match=re.escape(problem)):
        submit.run(parse(["submit", *words])[1])
    assert not (login_node / "calls").exists()
