"""Every file of a checkpoint truncated, flipped, emptied, removed: it is named, and the checkpoint before is used."""

from __future__ import annotations

import filecmp
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from ranks import cloze_ranks, succeed

from cloze.checkpoint.format import (
    list_checkpoints,
    read_manifest,
    replace_checkpoint,
    rotate,
    tidy,
    verify_checkpoint,
    write_manifest,
)
from cloze.errors import CheckpointError
from cloze.training.checkpointing.restore import choose_checkpoint

FLAGS = [*TINY_MODEL, "--max_steps", "6", "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-3"]
FLAGS += ["--per_device_train_batch_size", "2"]


def flags(prepared: Path, output: Path, *more: str) -> list[str]:
    where = ["--dataset_name", str(prepared), "--output_dir", str(output), "--resume_from_checkpoint", "auto"]
    return ["train", *FLAGS, *where, *more]


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    succeed(cloze_ranks(flags(prepared, folder / "run"), 2, "zero1", folder / "log"))
    return folder / "run"


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1 << 4
    file.write_bytes(data)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def append(file: Path) -> None:
    with open(file, "ab") as end:
        end.write(b"\0")


DAMAGES: list[Callable[[Path], None]] = [truncate, flip, empty, append, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_to_any_file_is_found_and_named(whole: Path, tmp_path: Path, damage: Callable[[Path], None], capsys):
    files = [
        path.relative_to(whole / "checkpoint-6") for path in (whole / "checkpoint-6").rglob("*") if path.is_file()
    ]
    assert {"checkpoint.json", "rank-00001.safetensors", "model/config.json"} <= {name.as_posix() for name in files}
    for name in files:
        run = tmp_path / name.name
        shutil.copytree(whole, run)
        damage(run / "checkpoint-6" / name)
        assert choose_checkpoint(run, "auto", 0, 1) == run / "checkpoint-4", name
        warned = capsys.readouterr().err.splitlines()
        assert len(warned) == 1
        assert "checkpoint-6" in warned[0]
        assert name.name in warned[0] or "no checkpoint.json" in warned[0]
        with pytest.raises(CheckpointError, match=r"use an earlier checkpoint|give a checkpoint-N folder"):
            choose_checkpoint(run, str(run / "checkpoint-6"), 0, 1)
        shutil.rmtree(run)


def test_a_bit_that_flips_anywhere_in_the_manifest_is_found(whole: Path, tmp_path: Path):
    shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6")
    file = tmp_path / "checkpoint-6" / "checkpoint.json"
    plain, rng = file.read_bytes(), random.Random(1)
    for _ in range(500):
        data = bytearray(plain)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"damaged|not known here"):
            read_manifest(tmp_path / "checkpoint-6")


@pytest.mark.parametrize("name", ["rank-00001.safetensors", "checkpoint.json", "model/tokenizer.json"])
def test_ranks_agree_on_the_checkpoint_before(prepared: Path, whole: Path, tmp_path: Path, name: str):
    shutil.copytree(whole, tmp_path / "run")
    flip(tmp_path / "run" / "checkpoint-6" / name)
    truncate(tmp_path / "run" / "checkpoint-4" / "frozen.safetensors")
    outcomes = cloze_ranks(flags(prepared, tmp_path / "run"), 2, "zero1", tmp_path / "log")
    succeed(outcomes)
    assert outcomes[0].output.count("trying the checkpoint before") == 2
    assert "checkpoint-2 at step 2" in outcomes[0].output
    for file in (whole / "checkpoint-6").glob("*.safetensors"):
        assert filecmp.cmp(file, tmp_path / "run" / "checkpoint-6" / file.name, shallow=False)


def test_all_damaged_is_one_line(prepared: Path, whole: Path, tmp_path: Path):
    """Starting again from nothing in the same folder would throw work away without a word."""
    shutil.copytree(whole, tmp_path / "run")
    for folder in list_checkpoints(tmp_path / "run"):
        flip(folder / "rank-00000.safetensors")
    outcomes = cloze_ranks(flags(prepared, tmp_path / "run"), 2, "zero1", tmp_path / "log")
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert "all checkpoints are damaged; start in another output_dir" in outcomes[0].output
    assert "Traceback" not in outcomes[0].output


def test_state_that_is_not_what_was_stored_is_refused(prepared: Path, whole: Path, tmp_path: Path):
    """Files and manifest agree with each other, but a moment is not the one that was trained."""
    from safetensors.torch import load_file, save_file

    from cloze.utils.atomic_files import sha256

    shutil.copytree(whole, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint-6"
    file = folder / "rank-00001.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("dense.weight:exp_avg_sq"))
    tensors[name][0] += 1e-3
    save_file(tensors, file)
    manifest = read_manifest(folder)
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_manifest(folder, manifest)
    outcomes = cloze_ranks(flags(prepared, tmp_path / "run", "--max_steps", "6"), 2, "zero1", tmp_path / "log")
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert f"does not hold what the checkpoint stores (1 tensors, {name} first)" in outcomes[0].output


def test_a_checkpoint_under_the_name_of_another_step_is_refused_and_stays(prepared: Path, whole: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoint-6")
    (run / "checkpoint-4").rename(run / "checkpoint-6")
    (run / "checkpoint-2").rename(run / "checkpoint-8")
    names = sorted(path.name for path in run.iterdir())
    outcomes = cloze_ranks(flags(prepared, run, "--max_steps", "9"), 2, "zero1", tmp_path / "log")
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert "checkpoint-6: holds step 4; rename it to checkpoint-4" in outcomes[0].output
    assert sorted(path.name for path in run.iterdir() if path.name.startswith("checkpoint")) == [
        name for name in names if name.startswith("checkpoint")
    ]


def test_rotation_keeps_the_last_good_one(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "run")
    truncate(tmp_path / "run" / "checkpoint-6" / "rank-00000.safetensors")
    rotate(tmp_path / "run", keep=1)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-6"]
    verify_checkpoint(tmp_path / "run" / "checkpoint-4")


def test_rotation_keeps_no_more_than_asked_if_one_of_those_is_good(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "run")
    truncate(tmp_path / "run" / "checkpoint-6" / "rank-00000.safetensors")
    rotate(tmp_path / "run", keep=2)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-6"]


def test_what_a_cut_save_or_deletion_left_is_put_in_order(whole: Path, tmp_path: Path):
    run, token = tmp_path / "run", "0123456789abcdef"
    shutil.copytree(whole, run)
    (run / "checkpoint-2").rename(run / f"checkpoint-2.old-{token}")
    (run / "checkpoint-6").rename(run / f"checkpoint-6.replaced-{token}")
    shutil.copytree(run / "checkpoint-4", run / f"checkpoint-4.replaced-{token}")
    shutil.copytree(run / "checkpoint-4", run / f"checkpoint-8.tmp-{token}")
    tidy(run)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_what_a_user_put_beside_the_checkpoints_stays(whole: Path, tmp_path: Path):
    """A name without the token of a start is the user's; only what earlier versions moved aside is put back."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    names = [
        "checkpoint-4.old",
        "checkpoint-4.replaced",
        "checkpoint-8.tmp",
        "checkpoint-4.old-mine",
        "checkpoint-4 copy",
    ]
    for name in names:
        shutil.copytree(run / "checkpoint-4", run / name)
    (run / "checkpoint-6").rename(run / "checkpoint-6.replaced")
    tidy(run)
    rotate(run, keep=1)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == sorted(["checkpoint-6", *names])


def test_rotation_keeps_the_checkpoint_that_was_just_written(whole: Path, tmp_path: Path):
    """Also beside newer ones that somebody has put there."""
    shutil.copytree(whole, tmp_path / "run")
    rotate(tmp_path / "run", keep=1, saved=tmp_path / "run" / "checkpoint-2")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-6"]


def test_of_a_checkpoint_that_is_a_link_only_the_link_is_deleted(whole: Path, tmp_path: Path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "big")
    (tmp_path / "run" / "checkpoint-2").symlink_to(tmp_path / "big")
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "big-4")
    (tmp_path / "run" / "checkpoint-4").symlink_to(tmp_path / "big-4")
    shutil.copytree(whole / "checkpoint-4", tmp_path / "run" / "staged")
    replace_checkpoint(tmp_path / "run" / "staged", tmp_path / "run" / "checkpoint-4")
    rotate(tmp_path / "run", keep=2)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not (tmp_path / "run" / "checkpoint-4").is_symlink()
    assert verify_checkpoint(tmp_path / "big")
    assert verify_checkpoint(tmp_path / "big-4")
    assert capsys.readouterr().err.count("its target is kept") == 2


def test_a_checkpoint_of_another_format_says_so(whole: Path, tmp_path: Path):
    shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6")
    manifest = json.loads((tmp_path / "checkpoint-6" / "checkpoint.json").read_text())
    for version, hint in ((99, "use a newer Cloze"), (1, "use the Cloze that wrote it")):
        (tmp_path / "checkpoint-6" / "checkpoint.json").write_text(json.dumps({**manifest, "format_version": version}))
        with pytest.raises(CheckpointError, match=hint):
            read_manifest(tmp_path / "checkpoint-6")
