"""One run folder, one run: who may start in it, what makes two starts the same run, and what a start never loses."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from ranks import Outcome, at_call, cloze_ranks, entering, run_ranks, start_ranks, succeed, wait_for

FLAGS = [*TINY_MODEL, "--logging_steps", "1", "--learning_rate", "1e-3", "--per_device_train_batch_size", "2"]


def flags(prepared: Path, output: Path, *more: str, steps: int = 6) -> list[str]:
    where = ["--dataset_name", str(prepared), "--output_dir", str(output)]
    return ["train", *FLAGS, "--max_steps", str(steps), "--save_steps", "2", *where, *more]


def error_of(output: str) -> str:
    """The one line that a command ends with."""
    lines = [line for line in output.splitlines() if line.startswith("cloze: error: ")]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0]


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("run")
    succeed(cloze_ranks(flags(prepared, folder / "run"), 1, "single", folder / "log"))
    return folder / "run"


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder, symlinks=True)
    return folder


def test_a_second_start_beside_a_live_one_is_refused_and_touches_nothing(prepared: Path, tmp_path: Path):
    output, go = tmp_path / "run", tmp_path / "go"
    pause = at_call("cloze.training.trainer", "train_step", 3, lambda: wait_for(go.exists), rank=0)
    first = entering(flags(prepared, output), "ddp", pause)
    pids, logs = start_ranks(first, 2, tmp_path / "first")
    wait_for(lambda: (output / "checkpoint-2" / "checkpoint.json").exists(), pids=pids, logs=logs)
    before = contents(output)
    second = cloze_ranks(flags(prepared, output, "--resume_from_checkpoint", "auto"), 1, "single", tmp_path / "second")
    assert second[0].code == 2
    assert f"another start is training in this folder: pid {pids[0]} on" in error_of(second[0].output)
    assert contents(output) == before
    go.touch()
    for pid, log in zip(pids, logs, strict=True):
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, log.read_text()
    assert steps_of(output) == [1, 2, 3, 4, 5, 6]
    assert not (output / ".owner").exists()


def test_a_start_that_lost_its_folder_ends_in_one_line_on_every_rank_and_writes_nothing(
    prepared: Path, tmp_path: Path
):
    output = tmp_path / "run"

    def take_over() -> None:
        other = json.loads((output / ".owner").read_text()) | {"token": "0" * 16, "launch": "requeued"}
        (output / "new").write_text(json.dumps(other))
        os.replace(output / "new", output / ".owner")
        (output / "before.json").write_text(json.dumps(sorted(path.name for path in output.iterdir())))

    lose = at_call("cloze.training.trainer", "train_step", 4, take_over, rank=0)
    outcomes = cloze_ranks(flags(prepared, output), 2, "ddp", tmp_path / "log", before=lose)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert "does not own the run folder any more" in error_of(outcomes[0].output)
    names = json.loads((output / "before.json").read_text())
    assert sorted(path.name for path in output.iterdir()) == sorted([*names, "before.json"])
    assert steps_of(output) == [1, 2, 3]
    assert json.loads((output / "status.json").read_text())["status"] == "running"


def test_resuming_an_older_checkpoint_moves_newer_ones_aside(prepared: Path, run: Path, tmp_path: Path):
    output = copy_of(run, tmp_path / "run")
    more = ["--resume_from_checkpoint", str(output / "checkpoint-2"), "--save_total_limit", "1"]
    outcome = cloze_ranks(flags(prepared, output, *more), 1, "single", tmp_path / "log")
    succeed(outcome)
    assert f"checkpoint-4, checkpoint-6 moved to {output / 'superseded-1'}" in outcome[0].output
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-6"]
    assert steps_of(output) == steps_of(output / "superseded-1") == [1, 2, 3, 4, 5, 6]
    for step in (4, 6):
        name = f"checkpoint-{step}/rank-00000.safetensors"
        assert filecmp.cmp(run / name, output / "superseded-1" / name, shallow=False)
    name = "checkpoint-6/rank-00000.safetensors"
    assert filecmp.cmp(run / name, output / name, shallow=False)


def test_a_checkpoint_of_another_folder_begins_a_branch_that_resumes_by_itself(prepared, run, tmp_path):
    output, origin = tmp_path / "branch", run / "checkpoint-2"
    more = ["--resume_from_checkpoint", str(origin)]
    die = at_call("cloze.training.trainer", "train_step", 2, lambda: os._exit(9), rank=0)
    killed = cloze_ranks(flags(prepared, output, *more), 1, "ddp", tmp_path / "a", before=die)
    assert killed[0].code == 9
    assert steps_of(output) == [1, 2, 3]
    outcome = cloze_ranks(flags(prepared, output, "--resume_from_checkpoint", "auto"), 1, "single", tmp_path / "b")
    succeed(outcome)
    assert json.loads((output / "run.json").read_text())["branched_from"] == str(origin)
    assert steps_of(output) == [1, 2, 3, 4, 5, 6]
    name = "checkpoint-6/rank-00000.safetensors"
    assert filecmp.cmp(run / name, output / name, shallow=False)
    before = contents(output)
    refused = cloze_ranks(flags(prepared, output, *more), 1, "single", tmp_path / "c")
    assert refused[0].code == 2
    assert "holds a run already, and" in error_of(refused[0].output)
    assert contents(output) == before


def ranks_with(argvs: list[list[str]], log: Path) -> list[Outcome]:
    """Run `cloze` on ranks with an argument list each."""

    def enter() -> None:
        try:
            entering(argvs[int(os.environ["RANK"])], "ddp")()
        finally:
            threading._shutdown()  # as at the end of any process

    return run_ranks(enter, len(argvs), log)


def changed_copy(prepared: Path, folder: Path) -> Path:
    """A node's copy whose manifest is the right one, but one byte of a shard is not."""
    shutil.copytree(prepared, folder)
    shard = sorted((folder / "train").glob("*.arrow"))[-1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return folder


def test_ranks_that_differ_end_before_the_first_step(prepared: Path, tmp_path: Path):
    output, host = tmp_path / "run", os.uname().nodename
    one = flags(prepared, output)
    outcomes = ranks_with([one, [*one, "--learning_rate", "1e-2"]], tmp_path / "log")
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert f"rank 1 on {host} has learning_rate 0.01, but rank 0 on" in error_of(outcomes[0].output)
    assert not output.exists()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_before_it_joins_ends_the_others_with_its_error(
    prepared: Path, tmp_path: Path, failing: int
):
    """No launcher ends the ranks here, as with one started by hand on each machine."""
    argvs = [flags(prepared, tmp_path / "run"), flags(prepared, tmp_path / "run")]
    argvs[failing] = flags(changed_copy(prepared, tmp_path / "copy"), tmp_path / "run")
    outcomes = ranks_with(argvs, tmp_path / "log")
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert ".arrow" in error_of(outcomes[0].output)
    assert (f"rank 1 on {os.uname().nodename}: " in outcomes[0].output) == (failing == 1)
    assert not (tmp_path / "run" / ".owner").exists()


def test_ranks_may_find_the_same_data_and_model_at_different_places(prepared: Path, tmp_path: Path, base: Path):
    shutil.copytree(prepared, tmp_path / "local")
    shutil.copytree(base, tmp_path / "local-base")
    shared = ["--max_steps", "1", "--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size", "2"]
    places = [(prepared, base), (tmp_path / "local", tmp_path / "local-base")]
    argvs = [
        ["train", *shared, "--dataset_name", str(data), "--model_name_or_path", str(model)] for data, model in places
    ]
    succeed(ranks_with(argvs, tmp_path / "log"))


@pytest.fixture(scope="module")
def base(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model."""
    from cloze.cli.commands import consolidate
    from cloze.config import ConsolidateConfig

    folder = tmp_path_factory.mktemp("base") / "base"
    consolidate.run(ConsolidateConfig(checkpoint=str(run), output=str(folder)))
    return folder


def test_a_run_resumes_when_its_base_model_has_moved_or_is_gone(prepared: Path, tmp_path: Path, base: Path):
    first = shutil.copytree(base, tmp_path / "first" / "base")

    def argv(output: Path, model: Path | str, steps: str) -> list[str]:
        where = ["--dataset_name", str(prepared), "--output_dir", str(output), "--resume_from_checkpoint", "auto"]
        return ["train", *where, "--model_name_or_path", str(model), "--max_steps", steps, "--save_steps", "1"]

    whole, output = tmp_path / "whole", tmp_path / "run"
    succeed(cloze_ranks(argv(whole, first, "2"), 1, "ddp", tmp_path / "a"))
    die = at_call("cloze.training.trainer", "train_step", 2, lambda: os._exit(9), rank=0)
    assert cloze_ranks(argv(output, f"{first}/", "2"), 1, "ddp", tmp_path / "b", before=die)[0].code == 9
    cut = copy_of(output, tmp_path / "cut")
    moved = tmp_path / "second" / "model-of-another-name"
    moved.parent.mkdir()
    first.rename(moved)
    succeed(cloze_ranks(argv(output, moved, "2"), 1, "ddp", tmp_path / "c"))
    outcome = cloze_ranks(argv(cut, first, "2"), 1, "ddp", tmp_path / "d")
    succeed(outcome)
    assert "its weights come from the checkpoint" in outcome[0].output
    for folder in (output, cut):
        for name in ("rank-00000.safetensors", "frozen.safetensors"):
            assert filecmp.cmp(whole / "checkpoint-2" / name, folder / "checkpoint-2" / name, shallow=False)
    refused = cloze_ranks(argv(cut, tmp_path / "no-such-base", "2"), 1, "ddp", tmp_path / "e")
    assert refused[0].code == 2
    assert "another run (model_name_or_path" in error_of(refused[0].output)


def drop_rights() -> None:
    """Root writes everywhere unless it gives up the right to."""
    import ctypes

    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


def test_a_run_folder_that_cannot_be_written_is_named_before_time_is_spent(prepared: Path, run: Path, tmp_path: Path):
    output = copy_of(run, tmp_path / "run")
    output.chmod(0o555)
    evaluation = ["evaluate", str(output), "--data", str(prepared)]
    for argv, hint in (
        (flags(prepared, output, "--resume_from_checkpoint", "auto"), "choose another"),
        (evaluation, "--output FILE"),
        (["consolidate", str(output)], "--output"),
        (["report", str(output)], "--output FILE"),
    ):
        outcome = cloze_ranks(argv, 1, "single", tmp_path / "log", before=drop_rights)[0]
        line = error_of(outcome.output)
        assert outcome.code == 2
        assert f"{output}" in line
        assert "cannot write: Permission denied" in line
        assert hint in line
        assert "perplexity" not in outcome.output
    elsewhere = tmp_path / "eval.json"
    succeed(cloze_ranks([*evaluation, "--output", str(elsewhere)], 1, "single", tmp_path / "b", before=drop_rights))
    assert json.loads(elsewhere.read_text())["perplexity"] > 1
    output.chmod(0o755)


def test_a_model_folder_that_is_a_link_is_consolidated_into_again(run: Path, tmp_path: Path):
    from cloze.config import ConsolidateConfig
    from cloze.export.consolidation.consolidate import consolidate

    output = copy_of(run, tmp_path / "run")
    (output / "checkpoint-6").rename(tmp_path / "checkpoint-on-a-big-disk")
    (output / "checkpoint-6").symlink_to(tmp_path / "checkpoint-on-a-big-disk")
    consolidate(ConsolidateConfig(checkpoint=str(output)))
    (output / "model").rename(tmp_path / "big-model")
    (output / "model").symlink_to(tmp_path / "big-model")
    (tmp_path / "big-model" / "cloze.json").write_text("{}")
    for _ in range(2):
        consolidate(ConsolidateConfig(checkpoint=str(output)))
    assert (output / "model").is_symlink()
    assert (tmp_path / "big-model" / "cloze.json").read_text() != "{}"
    assert (output / "checkpoint-6").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big-model", "checkpoint-on-a-big-disk", "run"]


def test_a_checkpoint_that_rotation_deletes_while_it_is_read_is_one_line(run: Path, tmp_path: Path, monkeypatch):
    from cloze.checkpoint.format import find_checkpoint, read_manifest, rotate, verify_checkpoint, write_manifest
    from cloze.checkpoint.open_model import load_checkpoint
    from cloze.config import ConsolidateConfig
    from cloze.errors import CheckpointError
    from cloze.export.consolidation import model_folder
    from cloze.export.consolidation.consolidate import consolidate

    output = copy_of(run, tmp_path / "run")
    write = model_folder.tidy_config

    def rotated(*args, **kwargs) -> None:
        shutil.rmtree(output / "checkpoint-6")
        write(*args, **kwargs)

    monkeypatch.setattr(model_folder, "tidy_config", rotated)
    with pytest.raises(CheckpointError, match="checkpoint-6: was deleted"):
        consolidate(ConsolidateConfig(checkpoint=str(output)))
    assert not (output / "model").exists()
    with pytest.raises(CheckpointError, match="was deleted while it was read"):
        load_checkpoint(output / "checkpoint-6")

    names = []

    def slow(folder: Path, *args, **kwargs):
        names.append(folder.name)
        if len(names) == 1:  # training saves, and rotates
            saved = shutil.copytree(output / "checkpoint-2", output / "checkpoint-8")
            manifest = read_manifest(saved)
            write_manifest(saved, {**manifest, "position": {**manifest["position"], "global_step": 8}})
            rotate(output, 1)
        return verify_checkpoint(folder, *args, **kwargs)

    monkeypatch.setattr("cloze.checkpoint.format.verify_checkpoint", slow)
    assert find_checkpoint(output) == output / "checkpoint-8"
