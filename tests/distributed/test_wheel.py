"""What is published is whole: the wheel and sdist hold what a user needs, and run in an environment of their own.

Slow: needs the package registry, and installs everything anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from repository import ROOT

from cloze.cli.commands.init import FOLDERS, KIT, NOT_IN_A_WHEEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def call(*words: object, cwd: Path) -> str:
    """Run a command without this project's source on the path; fails with all that it said."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is made of it. From a copy: building leaves folders behind."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).exists():
            (source / name).write_bytes((ROOT / name).read_bytes())
            (source / name).chmod((ROOT / name).stat().st_mode)
    call(sys.executable, "-m", "venv", folder / "tools", cwd=folder)
    call(folder / "tools/bin/pip", "install", "-q", "build", "twine", cwd=folder)
    call(folder / "tools/bin/python", "-m", "build", "-o", folder, source, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


def kit_files() -> set[str]:
    """What `cloze init` writes in the repository."""
    files = [path for folder in FOLDERS for path in (KIT / folder).resolve().rglob("*") if path.is_file()]
    names = [path.relative_to(ROOT) for path in files]
    return {name.as_posix() for name in names if not {*name.parts} & {*NOT_IN_A_WHEEL}}


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    expected = {name.removeprefix("src/") for name in tracked.split() if not (ROOT / name).is_symlink()}
    in_package = {name for name in names if name.startswith("cloze/")}
    assert in_package == expected | {f"cloze/tools/launch/kit/{name}" for name in kit_files()}
    assert {
        "cloze/py.typed",
        "cloze/tools/demo/facts/planets.csv",
        "cloze/tools/launch/kit/slurm/train.sbatch",
    } <= in_package
    assert all(name.startswith("cloze-") and ".dist-info/" in name for name in names - in_package)
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_holds_the_source_and_no_caches(built: Path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "src/cloze/py.typed"} <= names
    assert not [name for name in names if name.startswith("tests") or "__pycache__" in name or name.endswith(".pyc")]


def test_the_registry_would_take_them(built: Path):
    assert call(built / "tools/bin/twine", "check", "--strict", *built.glob("cloze-*"), cwd=built).count("PASSED") == 2


def test_from_the_wheel_alone_the_demo_runs_in_an_empty_folder(wheel: Path, tmp_path: Path, figure):
    call(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    pip = [tmp_path / "venv/bin/pip", "install", "-q", "-c", ROOT / "launch/constraints.txt"]
    call(*pip, f"{wheel}[fast,test,report]", cwd=tmp_path)
    bin_folder, empty = tmp_path / "venv/bin", tmp_path / "empty"
    empty.mkdir()
    version = call(bin_folder / "cloze", "--version", cwd=empty)
    assert version.strip() == f"cloze {wheel.name.split('-')[1]}"
    assert "perplexity" in call(bin_folder / "cloze", "demo", "--max_steps", "3", cwd=empty)
    call(bin_folder / "cloze", "init", ".", cwd=empty)
    written = {path.relative_to(empty).as_posix() for name in FOLDERS for path in (empty / name).rglob("*")}
    assert kit_files() <= written
    assert os.access(empty / "slurm/submit", os.X_OK)
    recipe = "launch/recipes/roberta-base.yaml"
    plan = call(bin_folder / "cloze", "plan", recipe, "--gpus", "8xH100-80GB", "--vocab_size", 50265, cwd=empty)
    assert "zero2" in plan.lower()
