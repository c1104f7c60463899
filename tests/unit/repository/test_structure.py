"""What keeps the code livable: imports go one way, modules and functions stay small, pure modules stay pure."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import layers
import pytest
from repository import MODULES, PACKAGE, ROOT, name_of

from cloze.utils import run_files

# The top of the package from the outside in: a part imports from its own layer and those after it.
LAYERS = [
    ["__main__", "cli"],
    ["tools"],
    ["export"],
    ["training"],
    ["evaluation"],
    ["checkpoint"],
    ["model"],
    ["data"],
    ["distributed"],
    ["config"],
    ["utils"],
    ["errors"],
]
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
PURE = ["counter_rng", "sampler", "batch_size_warmup", "masking", "word_boundaries"]


def imports_of(path: Path) -> set[str]:
    """Every module imported anywhere in a file, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_at_the_top_of_the_package_go_one_way():
    graph = layers.imports()
    order = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    assert order.keys() == graph.keys()
    for part, uses in graph.items():
        assert {other for other in uses if order[other] < order[part]} == set(), part


@pytest.mark.parametrize("folder", layers.folders())
def test_imports_within_a_folder_form_no_circle(folder: str):
    layers.layers(layers.imports(folder))


def test_folders_stay_small():
    """A command is a module, so there are as many of these as commands."""
    entries = [path for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.suffix != ".typed"]
    assert len(entries) <= 12
    for folder in layers.folders():
        modules = [path for path in (PACKAGE / folder).glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= (16 if folder != "cli/commands" else 24), folder


def test_what_works_on_checkpoints_does_not_need_training():
    for folder in ("checkpoint", "evaluation", "export", "tools/report", "tools/launch"):
        for path in (PACKAGE / folder).rglob("*.py"):
            assert not [one for one in layers.imported_modules(path) if one.startswith("training")], path


@pytest.mark.parametrize("name", ["data/prepared/packing.py", *(f"data/batches/{name}.py" for name in PURE)])
def test_pure_modules_import_nothing_but_numpy(name: str):
    outside = {imported.split(".")[0] for imported in imports_of(PACKAGE / name)} - set(sys.stdlib_module_names)
    assert outside <= {"numpy", "cloze"}


def test_the_data_package_knows_nothing_of_training_and_processes():
    for path in (PACKAGE / "data").rglob("*.py"):
        for imported in imports_of(path):
            assert not imported.startswith(("cloze.training", "cloze.model", "cloze.distributed", "accelerate")), path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_stay_small(path: Path):
    text = path.read_text()
    limit = 250 if name_of(path) == "training/trainer.py" else 300
    assert len(text.splitlines()) <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{name_of(path)}: {node.name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_and_public_function_says_what_it_is(path: Path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(path)}: {node.name}"


def test_paths_are_resolved_where_a_loop_of_links_is_no_error():
    """Path.resolve raises RuntimeError for one; `cloze.utils.foreign.paths.real_path` does not."""
    for path in MODULES:
        assert ".resolve()" not in path.read_text(), path


def test_test_files_have_unique_names():
    """In folders that are not packages, pytest collects only the first of two files with the same name."""
    names = Counter(path.name for path in TESTS if not (path.parent / "__init__.py").exists())
    assert [name for name, count in names.items() if count > 1] == []


def test_test_files_stay_small():
    for path in TESTS:
        assert len(path.read_text().splitlines()) <= 400, path


def test_no_test_file_imports_another():
    names = {path.stem for path in TESTS}
    for path in TESTS:
        assert not {part for name in imports_of(path) for part in name.split(".")[:2]} & names, path


def test_the_names_of_a_runs_files_stand_in_one_module():
    names = {value for name, value in vars(run_files).items() if name.isupper()}
    assert len(names) == 11
    found = [
        f"{name_of(path)}: {node.value}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert sorted(found) == sorted(f"{name_of(Path(run_files.__file__))}: {name}" for name in names)


def test_tests_expect_the_facts_of_a_message_and_not_its_sentence():
    """At most ten words of a `match`: class, place, names and numbers. The sentence may change."""
    long = []
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "match":
                parts = [part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)]
                words = re.findall(r"[a-z]{2,}", re.sub(r"`[^`]*`|--\w+", "", " ".join(map(str, parts))))
                long += [f"{path.name}:{node.value.lineno}"] if len(words) > 10 else []
    assert long == []
