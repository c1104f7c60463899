"""What keeps the code livable: imports go one way, modules and functions stay small, pure modules stay pure."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest

import cloze

PACKAGE = Path(cloze.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# From the outside in: a module may import its own layer and the ones after it.
LAYERS = [
    ["cli", "command_line", "__main__", "jobs", "launcher", "api", "kernel", "processes"],
    ["commands"],
    ["demo", "doctor", "metrics", "bench", "inspection", "replay", "planning", "report"],
    ["grow"],
    ["fill", "measure", "hub"],
    ["consolidate", "opening"],
    ["model_path"],
    ["train"],
    ["cards", "evaluation", "model", "sample"],
    ["data"],
    ["distributed"],
    ["rendezvous"],
    ["collectives"],
    ["closeness", "fully_sharded", "tensorfile"],
    ["telling"],
    ["failures", "options"],
    ["lineage"],
    [
        "console",
        "files",
        "output_file",
        "config",
        "memory",
        "places",
        "wire",
        "machine",
        "screen",
    ],
    ["events", "results"],
    ["foreign"],
    ["secret"],
    ["environment"],
    ["early", "errors", "heartbeat", "redact", "mappings"],
]
PURE = ["hashing", "sampler", "batch_size", "masking", "words", "packing"]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def layer_of(module: str) -> int:
    top = module.split("/")[0].removesuffix(".py")
    return next(number for number, layer in enumerate(LAYERS) if top in layer)


def imports_of(path: Path) -> set[str]:
    """Every module imported anywhere in a file, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path: Path):
    if name_of(path) == "__init__.py":
        return
    for imported in imports_of(path):
        parts = imported.split(".")
        if parts[0] == "cloze" and len(parts) > 1 and parts[1] != "__version__":
            assert layer_of(parts[1]) >= layer_of(name_of(path)), f"{name_of(path)} imports {imported}"


@pytest.mark.parametrize("name", [f"data/{name}.py" for name in PURE])
def test_pure_modules_import_nothing_but_numpy(name: str):
    outside = {imported.split(".")[0] for imported in imports_of(PACKAGE / name)} - set(sys.stdlib_module_names)
    assert outside <= {"numpy", "cloze"}


def test_the_data_package_knows_nothing_of_training_and_processes():
    for path in (PACKAGE / "data").glob("*.py"):
        for imported in imports_of(path):
            assert not imported.startswith(("cloze.train", "cloze.model", "cloze.distributed", "accelerate")), path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_stay_small(path: Path):
    text = path.read_text()
    limit = 250 if name_of(path) == "train/trainer.py" else 300
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
    """Path.resolve raises RuntimeError for one; `cloze.foreign.paths.real_path` does not."""
    for path in MODULES:
        assert ".resolve()" not in path.read_text(), path


def test_test_files_have_unique_names():
    """In folders that are not packages, pytest collects only the first of two files with the same name."""
    files = Path(__file__).parents[1].rglob("test_*.py")
    names = Counter(path.name for path in files if not (path.parent / "__init__.py").exists())
    assert [name for name, count in names.items() if count > 1] == []
