"""launch/env.sh makes an environment once, never believes in a half-made one, and says in one line what is missing.

The tests run the real script, with real environments, in a folder with a space and a quote in its name; only what
pip would download is left out: pip's arguments go into a log instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
from repository import ROOT

PREPARE = """
set -euo pipefail
source "$1/launch/env.sh"
install() { echo "$*" >>pip.log; [[ ! -e no-network ]]; }
prepare_environment "$2"
command -v python
"""
TOOLS = ["bash", "cat", "cut", "dirname", "flock", "grep", "mv", "rm", "sha256sum"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with nothing but what launch/env.sh reads."""
    folder = tmp_path / "it's a clone"
    (folder / "launch").mkdir(parents=True)
    for name in ("launch/env.sh", "launch/constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def prepare(clone: Path, extras: str = "test", **environment: str) -> subprocess.CompletedProcess[str]:
    """Prepare the environment from another current folder."""
    command = ["bash", "-c", PREPARE, "bash", str(clone), extras]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=120)


def installed(clone: Path) -> list[str]:
    """What pip was asked for since the last call."""
    log = clone / "pip.log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


@pytest.mark.slow
def test_installs_once_until_the_pins_change_and_again_after_a_failure(clone: Path):
    first = prepare(clone)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == f"{clone}/.venv/bin/python"
    assert installed(clone) == ["torch", "-e .[test]"]

    assert prepare(clone).returncode == 0
    assert installed(clone) == []
    assert prepare(clone, extras="tensorboard").returncode == 0
    assert installed(clone) == ["torch", "-e .[tensorboard]"]
    assert prepare(clone).returncode == 0
    assert installed(clone) == [], "what was installed before other extras came is still there"

    (clone / "launch/constraints.txt").write_text("torch==2.12.0\n")
    (clone / "no-network").touch()
    assert prepare(clone).returncode != 0
    assert installed(clone) == ["torch"]
    (clone / "no-network").unlink()
    shutil.copy(ROOT / "launch/constraints.txt", clone / "launch/constraints.txt")
    assert prepare(clone).returncode == 0
    assert installed(clone) == ["torch", "-e .[test]"], "the old stamp says nothing after a half-made installation"

    moved = clone.rename(clone.with_name("elsewhere"))
    after = prepare(moved)
    assert installed(moved) == ["torch", "-e .[test]"], "a moved environment still points to the old folder"
    assert after.stdout.splitlines()[-1] == f"{moved}/.venv/bin/python"


def test_two_at_once_install_one_after_the_other(clone: Path):
    slow = PREPARE.replace('echo "$*" >>pip.log;', "echo begin >>pip.log; sleep 1; echo end >>pip.log;")
    slow = slow.replace("prepare_environment", "make_venv() { mkdir -p .venv; }\nprepare_environment")
    command = ["bash", "-c", slow, "bash", str(clone)]
    environment = {**os.environ, "PYTHON": sys.executable}
    both = [
        subprocess.Popen([*command, extras], env=environment, stdout=subprocess.DEVNULL)
        for extras in ("test", "tensorboard")
    ]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert installed(clone) == ["begin", "end"] * 4


def test_compiled_modules_are_kept_even_if_a_container_forbids_it(clone: Path):
    script = PREPARE.replace("prepare_environment", "make_venv() { mkdir -p .venv; }\nprepare_environment", 1)
    script = script.replace("command -v python", 'echo "${PYTHONDONTWRITEBYTECODE-unset}"')
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["bash", "-c", script, "bash", str(clone), "test"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "unset"


def test_a_python_without_ensurepip_is_named_with_its_package(clone: Path, tmp_path: Path):
    tools = tmp_path / "bin"  # without apt-get
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(shutil.which(tool) or "/missing")
    python = tools / "python3"
    python.write_text(f'#!/bin/bash\n[[ $* != *ensurepip* ]] || exit 1\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = prepare(clone, PYTHON=str(python), PATH=str(tools))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert done.returncode == 2
    assert f"please install: python{version}-venv" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (clone / ".venv").exists()


def test_an_unusable_python_is_refused_in_one_line(clone: Path):
    done = prepare(clone, PYTHON="/no/such/python")
    assert done.returncode == 2
    assert done.stderr == "launch: error: PYTHON=/no/such/python is not a Python 3.10 or newer\n"
    assert not (clone / ".venv").exists()


ASK = """
set -euo pipefail
source "$1/launch/env.sh"
if may_install "some tests" munge fish; then install_debian munge fish; else echo refused; fi
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may install system packages")
@pytest.mark.parametrize(("choice", "installs"), [("no", False), ("yes", True), ("", True)])
def test_system_packages_are_named_before_root_installs_them_and_can_be_refused(
    clone: Path, tmp_path: Path, choice: str, installs: bool
):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text(f'#!/bin/sh\necho "$*" >>"{tmp_path}/apt.log"\n')
    (tools / "apt-get").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "CLOZE_INSTALL": choice}
    done = subprocess.run(["bash", "-c", ASK, "bash", str(clone)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "munge fish" in done.stdout
    assert "CLOZE_INSTALL=no" in done.stdout
    assert ("refused" in done.stdout) is not installs
    log = tmp_path / "apt.log"
    assert log.exists() is installs
    assert not installs or log.read_text().splitlines()[-1].endswith("munge fish")


def test_a_lock_names_each_file_that_pip_would_install_with_its_hash():
    loader = SourceFileLoader("lock", str(ROOT / "launch/lock"))
    lock = module_from_spec(spec_from_loader("lock", loader))
    loader.exec_module(lock)
    report = {
        "install": [
            {
                "metadata": {"name": "xxhash", "version": "4.1.0"},
                "download_info": {"url": "https://x/y.whl", "archive_info": {"hashes": {"sha256": "ab" * 32}}},
            },
            {
                "metadata": {"name": "cloze", "version": "1"},
                "download_info": {"url": "file:///here", "dir_info": {"editable": False}},
            },
        ]
    }
    assert lock.locked(report) == [f"xxhash==4.1.0 --hash=sha256:{'ab' * 32}"]
