"""What README's tables say of flags, errors, files and tests is so."""

from __future__ import annotations

import dataclasses
import re

import pytest
from repository import ROOT

from cloze.config.commands import COMMANDS, OLD_NAMES

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "launch/MEASURED.md", "launch/GPU.md", "launch/SCALING.md"]
FLAGS = {field.name for config, _, _ in COMMANDS.values() for field in dataclasses.fields(config)}
OF_OTHERS = {"hosts", "rank", "config", "help", "log_format"}  # launch/multi_node, the parser, all commands


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    lines = [line for line in section(title).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def flags_in(text: str) -> set[str]:
    return {name for code in re.findall(r"`([^`]+)`", text) for name in re.findall(r"--(\w+)", code)}


def test_readme_is_short():
    assert len(README.splitlines()) < 400


def test_flags_of_run_mlm_are_kept_or_answered():
    for there, here in rows("Coming from `run_mlm.py`"):
        assert flags_in(there), there
        assert flags_in(there) <= OLD_NAMES.keys() | FLAGS, there
        assert flags_in(here) <= FLAGS, here


def test_every_flag_in_readme_is_one():
    start = section("Coming from `run_mlm.py`")
    launcher = r"`(?:accelerate launch|launch/multi_node|pytest|apt-get|hf|srun)[^`]*`"
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL).replace(start, "")
    text = re.sub(launcher, "", text)
    assert flags_in(text) <= FLAGS | OF_OTHERS


def test_errors_in_readme_are_those_of_the_code():
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    named = [match for row in rows("When something goes wrong") for match in re.findall(r"^`([^`]+)`", row[0])]
    assert len(named) >= 10
    for message in named:
        assert message.removesuffix(" 'text'") in source, message


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.])((?:launch|tests|ds_configs|slurm)/[\w/.-]*\w)", text))
    named |= {f"src/cloze/{name}" for name in re.findall(r"`((?:model|data|train|planning)/\w+\.py)`", text)}
    assert named or document == "launch/SCALING.md"
    for name in named:
        assert (ROOT / name).exists(), name
