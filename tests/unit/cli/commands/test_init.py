"""`cloze init`: what the repository has beside the package, for whoever has the package only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from repository import ROOT

from cloze.cli.commands.init import FOLDERS, KIT, NOT_IN_A_WHEEL, run
from cloze.config import InitConfig
from cloze.errors import ConfigError


def test_init_writes_the_folders_that_commands_and_recipes_speak_of(tmp_path: Path):
    run(InitConfig(folder=str(tmp_path)))
    for name in ("ds_configs/zero2.json", "launch/accelerate/zero2.yaml", "slurm/train.sbatch", "launch/multi_node"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
        assert not (tmp_path / name).is_symlink()
    assert os.access(tmp_path / "slurm/submit", os.X_OK)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FOLDERS)
    assert not [path for path in tmp_path.rglob("*") if path.name in NOT_IN_A_WHEEL]


def test_init_overwrites_nothing(tmp_path: Path):
    (tmp_path / "slurm").mkdir()
    with pytest.raises(ConfigError, match="slurm: is there already"):
        run(InitConfig(folder=str(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slurm"]


def test_the_kit_is_the_repositorys_own_files():
    assert [(KIT / name).resolve() for name in FOLDERS] == [ROOT / name for name in FOLDERS]
