"""What CONTRIBUTING.md says is so: the files and names it points to are there, and so are its commands."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import layers
import pytest
from repository import ROOT

import cloze

PACKAGE = Path(cloze.__file__).parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
ROWS = re.findall(r"^\| ([^|]+) \| `([\w/.]+)` \| `([\w.]+)` \|$", GUIDE, re.MULTILINE)
ADDITIONS = re.findall(r"^\| (an? [^|]+) \| ([^|]+) \| ([^|]+) \|$", GUIDE.partition("| to add |")[2], re.MULTILINE)
PLACES = [
    (what, file, name)
    for what, *cells in ADDITIONS
    for cell in cells
    for file, name in re.findall(r"^`([\w/]+\.py)` `(\w+)`$", cell)
]


def defines(body: list[ast.stmt], name: str) -> bool:
    """Whether a function, class, method or constant of this (dotted) name is defined there."""
    first, _, rest = name.partition(".")
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == first:
            return not rest or (isinstance(node, ast.ClassDef) and defines(node.body, rest))
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        if any(isinstance(target, ast.Name) and target.id == first for target in targets):
            return not rest
    return False


@pytest.mark.parametrize(("what", "file", "name"), PLACES, ids=[f"{place[0]}, {place[1]}" for place in PLACES])
def test_what_to_edit_for_an_addition_is_there(what: str, file: str, name: str):
    assert defines(ast.parse((PACKAGE / file).read_text()).body, name), f"{what}: no {name} in {file}"


def test_the_guide_says_for_eight_additions_what_to_edit():
    assert len({what for what, _, _ in PLACES}) >= 6
    assert len(ADDITIONS) == 8


@pytest.mark.parametrize(("what", "file", "name"), ROWS, ids=[row[0] for row in ROWS])
def test_a_newcomer_finds_what_is_where(what: str, file: str, name: str):
    assert defines(ast.parse((PACKAGE / file).read_text()).body, name), f"{what}: no {name} in {file}"


def test_the_three_places_that_everyone_asks_for_are_named():
    assert {"a mask drawn", "the loss divided", "a checkpoint made visible"} <= {row[0] for row in ROWS}


def test_files_and_folders_in_the_guide_are_there():
    named = set(re.findall(r"(?:^|[`\s])(?:\./)?((?:launch|tests|src)/[\w/.]+)", GUIDE))
    assert len(named) >= 8
    assert [path for path in named if not (ROOT / path.rstrip("/.")).exists()] == []


def test_parts_of_the_package_do_not_import_each_other_in_circles():
    assert layers.layers(layers.imports())[-1] == ["errors"]
    with pytest.raises(ValueError, match="circle: a, b"):
        layers.layers({"a": {"b"}, "b": {"a"}, "c": set()})


def test_the_picture_of_the_layers_is_that_of_the_code():
    page = layers.PAGE.read_text()
    assert layers.with_picture(page) == page, "run `python tests/layers.py --write`"


@pytest.mark.parametrize(
    "folder", [folder for folder in layers.folders() if (PACKAGE / folder / "__init__.py").exists()]
)
def test_every_folder_says_in_a_sentence_what_it_is(folder: str):
    assert 10 < len(layers.summary(PACKAGE / folder / "__init__.py")) < 130
