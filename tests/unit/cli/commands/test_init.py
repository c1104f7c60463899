"""`cloze init`: the files of the repository beside the package, for users who have the package only."""

from __future__ import annotations

import os
import subprocess
from fnmatch import fnmatch
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


def test_a_wheel_has_the_files_that_init_writes(tmp_path: Path):
    """`package-data` lists them one by one; tests/distributed/test_wheel.py looks into a real wheel."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["cloze"]
    patterns = [pattern.removeprefix("tools/launch/kit/") for pattern in settings if "/kit/" in pattern]
    run(InitConfig(folder=str(tmp_path)))
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in written & set(tracked) if not any(fnmatch(name, one) for one in patterns)] == []
    assert [one for one in patterns if not any(fnmatch(name, one) for name in written)] == []
