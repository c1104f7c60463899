"""Records which tests run which blocks of statements, in every process that a test starts. Used by `run.py`.

As a pytest plugin (`-p hits`) it also records the seconds that each test takes. Both are appended to the file that
CLOZE_HITS names, one line each, so that processes that are killed lose nothing.
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest
from mutants import blocks_of, functions_of
from patch import CACHE

_seen: set[tuple[str | None, str]] = set()
_current: dict[str, list] = {}  # seconds and outcome of the test that runs, by its name


def hit(block: str) -> None:
    """Record that the current test, which pytest names in the environment, runs a block of statements."""
    test = os.environ.get("PYTEST_CURRENT_TEST")
    if test is None or (test, block) in _seen:
        return
    _seen.add((test, block))
    _append(f"hit\t{test}\t{block}")


def instrumented(module: str, source: str) -> str:
    """Return a module's source with a call of `hit` at the start of each block of a function."""
    tree = ast.parse(source)
    for name, function in list(functions_of(tree)):
        for block, statements in blocks_of(name, function, source).items():
            call = ast.parse(f"__import__('hits').hit({f'{module} {block}'!r})").body[0]
            has_docstring = statements is function.body and ast.get_docstring(function) is not None
            statements.insert(1 if has_docstring else 0, call)
    return ast.unparse(tree)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    _current[item.nodeid] = [0.0, "passed"]
    for module in [one for name, one in sys.modules.items() if name.startswith("cloze.")]:
        for cached in [value for value in vars(module).values() if type(value) is CACHE]:
            cached.cache_clear()  # so that a function runs in each test that calls it
    result = yield
    seconds, outcome = _current.pop(item.nodeid)
    _append(f"{outcome}\t{item.nodeid}\t{seconds:.3f}")
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    test = _current.get(report.nodeid)
    if test is not None:
        test[0] += report.duration
        test[1] = "failed" if report.failed else test[1]


def _append(line: str) -> None:
    with Path(os.environ["CLOZE_HITS"]).open("a") as file:
        file.write(line + "\n")
