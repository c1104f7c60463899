"""What README and docs say of links, options, errors, files and tests is true."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from documents import anchors, blocks, commands, links, pages
from repository import ROOT

from cloze.config.commands import COMMANDS, OLD_NAMES

PAGES = pages()
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]
OPTIONS = {
    name: {field.name for field in dataclasses.fields(config)} | {"config", "print_config", "help", "log_format"}
    for name, (config, _, _) in COMMANDS.items()
}
FLAGS = {flag for flags in OPTIONS.values() for flag in flags}
OTHERS = {"hosts", "rank", "nproc_per_node"}  # of launch/multi_node and torchrun
FROM_RUN_MLM = ROOT / "docs" / "from-run-mlm.md"


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", paths, ids=[path.relative_to(ROOT).as_posix() for path in paths])


def rows(page: Path) -> list[list[str]]:
    """The rows of a page's tables, without their headings."""
    lines = [line for line in read(page).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def flags_in(codes: list[str]) -> set[str]:
    return {name for code in codes for name in re.findall(r"--(\w+)", code)}


def test_readme_is_short_and_names_every_page():
    assert len(read(PAGES[0]).splitlines()) < 150
    assert {page.relative_to(ROOT).as_posix() for page in PAGES[1:]} <= set(links(read(PAGES[0])))


@each(LINKED)
def test_links_lead_somewhere(page: Path):
    for link in links(read(page)):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(read(target)), link


def test_a_broken_anchor_is_noticed():
    assert anchors("# One `two`: three\n```sh\n# no heading\n```\n## A_b-c\n") == {"one-two-three", "a_b-c"}
    assert links("[a](b.md#c) ![d](e.png) [f](https://g.org/)\n[h\ni](j.md)\n```\n[k](l.md)\n```\n") == [
        "b.md#c", "e.png", "j.md",
    ]  # fmt: skip


@each([page for page in PAGES if page != FROM_RUN_MLM])
def test_every_option_exists(page: Path):
    launchers = r"(?:accelerate launch|apt-get|hf|pip|pytest|srun) "
    codes = [code for code in inline_code(read(page)) if not re.match(launchers, code)]
    assert flags_in(codes) <= FLAGS | OTHERS
    for code in codes:
        command = re.match(r"cloze (\w+)", code)
        if command and command.group(1) != "COMMAND":
            assert command.group(1) in COMMANDS, code
            assert flags_in([code]) <= OPTIONS[command.group(1)], code


def test_options_of_run_mlm_are_kept_or_answered():
    for there, here in rows(FROM_RUN_MLM):
        assert flags_in(inline_code(there)), there
        assert flags_in(inline_code(there)) <= OLD_NAMES.keys() | FLAGS, there
        assert flags_in(inline_code(here)) <= FLAGS, here


def test_errors_are_those_of_the_code():
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    named = [match for row in rows(ROOT / "docs/errors.md") for match in re.findall(r"^`([^`]+)`", row[0])]
    assert len(named) >= 10
    for message in named:
        assert message.removesuffix(" 'text'") in source, message


@each([page for page in LINKED if page.name != "CHANGELOG.md"])
def test_files_that_are_named_exist(page: Path):
    text = read(page)
    named = set(re.findall(r"(?<![\w/.])((?:launch|tests|ds_configs|slurm|src)/[\w/.-]*\w)", text))
    for name in named - {"slurm/site.env", "launch/requirements.lock"}:  # these are made by their reader
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`([a-z_]+(?:/[a-z_\d]+)+\.py)`", text):
        assert (ROOT / name).exists() or (ROOT / "src/cloze" / name).exists(), name
    for names in re.findall(r"launch/accelerate/\{([\w,]+)\}\.yaml", text):
        for name in names.split(","):
            assert (ROOT / "launch" / "accelerate" / f"{name}.yaml").exists(), name


def test_commands_that_are_not_run_are_those_that_install():
    """Blocks of `sh` are run by tests/distributed/test_documented_commands.py, blocks of `bash` are not."""
    assert [words for page in PAGES for words in commands(page, "bash")] == [
        ["pip", "install", "-c", "launch/constraints.txt", ".[fast]"]
    ]
    assert {language for page in PAGES for language in re.findall(r"^```(\w+)$", read(page), re.MULTILINE)} == {
        "bash", "python", "sh", "text",
    }  # fmt: skip
    assert sum(len(blocks(read(page), "python")) for page in PAGES) == 1
