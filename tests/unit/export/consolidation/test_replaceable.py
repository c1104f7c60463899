"""Only a model folder that Cloze wrote is replaced; everything else is kept, and named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cloze.config import ConsolidateConfig, TrainConfig
from cloze.errors import CheckpointError, ConfigError
from cloze.export.consolidation.consolidate import consolidate
from cloze.export.consolidation.model_folder import choose_checkpoint
from cloze.export.consolidation.replaceable import check_replaceable
from cloze.training.run_dir import check_run_folder

OLD = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")


def make(folder: Path, *names: str) -> Path:
    """Make a folder with small files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_model_folders_of_this_version_and_of_older_ones_are_replaced(tmp_path: Path):
    check_replaceable(tmp_path / "missing" / "model")
    check_replaceable(make(tmp_path / "old", *OLD))
    shards = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "loss.svg", "cloze.json")
    check_replaceable(make(tmp_path / "new", *OLD, *shards, "vocab.json", "merges.txt"))
    check_replaceable(make(tmp_path / "grown", "config.json", "model.safetensors", "cloze.json", "grown.json"))
    (tmp_path / "link").symlink_to(tmp_path / "old")
    check_replaceable(tmp_path / "link")
    own_code = make(tmp_path / "own-code", *OLD, "modeling_mine.py")
    (own_code / "config.json").write_text('{"auto_map": {"AutoModelForMaskedLM": "modeling_mine.Mine"}}')
    check_replaceable(own_code)


def test_a_file_in_the_place_of_the_model_folder_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="exists and is not a model folder"):
        check_replaceable(make(tmp_path, "model") / "model")


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-5/checkpoint.json",
        "run.json",
        ".owner",
        ".git/HEAD",
        "config.yaml",
        "metrics.jsonl",
        "optimizer.pt",
        "trainer_state.json",
        "pytorch_model.bin",
        "notes/mine.txt",
        "thesis.tex",
        "train.py",
    ],
)
def test_a_folder_with_anything_else_is_refused_before_any_work_and_kept(tmp_path: Path, name: str):
    folder = make(tmp_path / "model", *OLD, "cloze.json", name)
    make(tmp_path / "run" / "checkpoint-1", "checkpoint.json")  # not a whole one: it is not even opened
    with pytest.raises(ConfigError, match=f"it holds {re.escape(name.split('/')[0])};"):
        consolidate(ConsolidateConfig(checkpoint=str(tmp_path / "run"), output=str(folder)))
    assert (folder / name).exists()


def link(folder: Path) -> None:
    (folder / "vocab.txt").symlink_to("/etc/hostname")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "line"),
    [(link, "it holds vocab.txt"), (remove("README.md"), "no cloze.json"), (remove("config.json"), "no config.json")],
)
def test_links_and_models_of_other_programs_are_refused(tmp_path: Path, change: Callable[[Path], None], line: str):
    folder = make(tmp_path / "model", *OLD)
    change(folder)
    with pytest.raises(ConfigError, match=line):
        check_replaceable(folder)


def test_nothing_is_written_inside_a_checkpoint(tmp_path: Path):
    checkpoint = make(tmp_path / "checkpoint-5", "checkpoint.json", *(f"model/{name}" for name in OLD))
    for folder in (checkpoint / "model", checkpoint / "other" / "deeper"):
        with pytest.raises(ConfigError, match="inside a checkpoint"):
            check_replaceable(folder)


@pytest.mark.parametrize("name", ["checkpoint-5", "renamed"])
def test_a_checkpoint_is_one_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """A damaged one, so that the error shows that it was taken for a checkpoint."""
    folder = make(tmp_path / name, "checkpoint.json")
    with pytest.raises(CheckpointError, match="format None is not known"):
        choose_checkpoint(folder)
    monkeypatch.setattr("cloze.export.consolidation.model_folder.verify_checkpoint", lambda _: None)
    monkeypatch.chdir(folder)
    assert choose_checkpoint(Path(".")).parent == tmp_path


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("base", "is a model folder"),
        ("base-with-run-json", "is the folder of the base model"),
        ("run/model", "inside model of the run"),
        ("run/model/deeper/new", "inside model of the run"),
        ("run/checkpoint-7/new", "inside checkpoint-7 of the run"),
        ("renamed/model", "inside renamed of a checkpoint"),
    ],
)
def test_training_does_not_write_into_a_model_or_a_checkpoint(tmp_path: Path, place: str, line: str):
    make(tmp_path, "base/config.json", "base-with-run-json/run.json", "base-with-run-json/config.json")
    make(tmp_path, "run/run.json", "renamed/checkpoint.json")
    config = TrainConfig(output_dir=str(tmp_path / place), model_name_or_path=str(tmp_path / "base-with-run-json"))
    with pytest.raises(ConfigError, match=line):
        check_run_folder(config)


@pytest.mark.parametrize("place", ["new", "run/nested", "base/run", "model"])
def test_training_may_write_beside_a_model_or_into_a_folder_inside_a_run(tmp_path: Path, place: str):
    make(tmp_path, "base/config.json", "run/run.json")
    check_run_folder(TrainConfig(output_dir=str(tmp_path / place), model_name_or_path=str(tmp_path / "base")))
