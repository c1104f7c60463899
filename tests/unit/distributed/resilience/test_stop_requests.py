"""A request to stop ends the process as one, wherever it arrives: no handler takes it for an error."""

from __future__ import annotations

import ast
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from ranks import cloze_ranks

import cloze
from cloze.errors import Stopped

PACKAGE = Path(cloze.__file__).parent
EVERYTHING = {"BaseException", "Stopped"}
# Where a process ends, so that Stopped becomes an exit code, or where it is raised after the handler.
ENDS = {"cli/command_line.py", "cli/commands/doctor.py", "tools/api/process_state.py", "distributed/collectives.py"}


def swallowing(source: str, may_end: bool = False) -> list[str]:
    """Each place of a module at which a Stopped that passes through would be lost: `line: what`."""
    tree = ast.parse(source)
    found = []
    # Signals raise in the main thread only: what a thread's own function hands on is no Stopped.
    targets = {
        ast.unparse(keyword.value).rsplit(".", 1)[-1]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Thread")
        for keyword in node.keywords
        if keyword.arg == "target"
    }
    in_threads = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name in targets
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node not in in_threads:
            names = names_in(node.type) if node.type is not None else {"BaseException"}
            caught = names & (EVERYTHING - {"Stopped"} if may_end else EVERYTHING)
            if caught and not isinstance(node.body[-1], ast.Raise):
                found.append(f"{node.lineno}: except without raise")
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress") and names_in(node) & EVERYTHING:
            found.append(f"{node.lineno}: suppress")
        if isinstance(node, ast.Try | ast.TryStar):
            found += [f"{left.lineno}: {type(left).__name__} in finally" for left in leaving(node.finalbody, True)]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in ("__exit__", "__aexit__"):
            for left in leaving(node.body, False):
                if isinstance(left, ast.Return) and ast.unparse(left.value or ast.Constant(None)) not in (
                    "None",
                    "False",
                ):
                    found.append(f"{left.lineno}: __exit__ with a value")
    return found


def names_in(node: ast.AST) -> set[str]:
    walked = list(ast.walk(node))
    return {n.id for n in walked if isinstance(n, ast.Name)} | {n.attr for n in walked if isinstance(n, ast.Attribute)}


def leaving(body: list[ast.stmt], loops: bool) -> list[ast.stmt]:
    """Statements of a body that leave it: return, and with `loops` break and continue of a loop around it."""
    found = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.Return) or (loops and isinstance(node, ast.Break | ast.Continue)):
            found.append(node)
        inner = loops and not isinstance(node, ast.For | ast.AsyncFor | ast.While)
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        for handler in getattr(node, "handlers", []) + getattr(node, "cases", []):
            children += handler.body
        found += leaving(children, inner)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_handler_of_the_package_swallows_a_request_to_stop(path: Path):
    assert swallowing(path.read_text(), path.relative_to(PACKAGE).as_posix() in ENDS) == []


@pytest.mark.parametrize(
    "source",
    [
        "try: f()\nexcept: pass",
        "try: f()\nexcept BaseException: log()",
        "try: f()\nexcept (OSError, builtins.BaseException) as e: raise_or_not(e)",
        "try: f()\nexcept errors.Stopped: pass",
        "with contextlib.suppress(BaseException): f()",
        "with suppress(OSError, Stopped): f()",
        "def g():\n  try: f()\n  finally:\n    return 1",
        "for x in y:\n  try: f()\n  finally:\n    if x: break",
        "class A:\n  def __exit__(self, *_): return True",
    ],
)
def test_the_scan_finds_handlers_that_swallow(source: str):
    assert len(swallowing(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "try: f()\nexcept BaseException:\n  g()\n  raise",
        "try: f()\nexcept Exception: pass",
        "try: f()\nfinally:\n  for x in y: break",
        "def run():\n  try: f()\n  except BaseException as e: put(e)\nThread(target=run).start()",
    ],
)
def test_the_scan_accepts_handlers_that_do_not(source: str):
    assert swallowing(source) == []


def test_stopped_is_no_exception_that_handlers_of_errors_catch():
    assert not issubclass(Stopped, Exception)


def sigterm_at(name: str) -> Callable[[], None]:
    """To be called in a rank: a real SIGTERM comes while a file of this name is being opened by Python code."""

    def install() -> None:
        sent: list[int] = []

        def watch(event: str, arguments: tuple) -> None:
            if event == "open" and not sent and str(arguments[0]).endswith(name):
                sent.append(1)
                os.kill(os.getpid(), signal.SIGTERM)

        sys.addaudithook(watch)

    return install


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("consolidate", ".metadata"),
        ("prepare", "tokenizer_config.json"),
        ("train", "tokenizer_config.json"),
        ("train", "data/manifest.json"),
    ],
)
def test_sigterm_while_a_file_is_read_is_no_damage_of_that_file(prepared, tmp_path, command, file):
    corpus, tokenizer = prepared.parent / "corpus.jsonl", prepared.parent / "tokenizer"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / ".metadata").write_bytes(b"\x80\x04N.")
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "roberta", "vocab_size": 600}')
    (tmp_path / "data").symlink_to(prepared)
    out, data = ["--output", str(tmp_path / "out")], ["--dataset_name", str(tmp_path / "data")]
    named = ["--tokenizer_name", str(tokenizer)]
    argv = {
        "consolidate": ["consolidate", str(tmp_path / "foreign"), *named, *out],
        "prepare": ["prepare", "--dataset_name", str(corpus), "--text_field", "answers.text", *named, *out],
        "train": ["train", *TINY_MODEL, *data, "--output_dir", str(tmp_path / "out"), "--max_steps", "2"],
    }[command]
    outcome = cloze_ranks(argv, 1, "single", tmp_path / "log", sigterm_at(file))[0]
    assert outcome.code == 75, outcome.output
    assert "SIGTERM" in outcome.output
    assert "error" not in outcome.output
