"""Every error that a person can meet says what is wrong, where, and what to do about it.

python tests/unit/repository/test_errors.py        # all of them as a table: message | hint | exit code
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import cloze
from cloze import errors

PACKAGE = Path(cloze.__file__).parent
KINDS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.ClozeError)
}
# A message that names what would be right needs no hint: "--step: must be at least 1".
SAYS_WHAT_TO_DO = re.compile(r"\b(must|give|choose|needs)\b")
# These lists only get shorter. What another rank said is passed on as it was; exit code 75 says "start again".
WITHOUT_HINT = {
    ("distributed/collectives.py", "rank 0 failed: {type(error).__name__}: {error}"),
    ("distributed/resilience/json_socket.py", "another rank ended while the processes were joining ({line[:200]})"),
    ("distributed/resilience/watchdog.py", "{line}"),
    ("distributed/resilience/watchdog.py", "{said['line']}"),
}
# The place is in the message: which rank, on which host, in what.
WITHOUT_PLACE = {
    *WITHOUT_HINT,
    ("distributed/launch_check.py", "accelerate sees {seen} processes, but {expected} were started (WORLD_SIZE)"),
    (
        "distributed/launch_check.py",
        "{launched.num_processes} processes{machines} were launched, but this world has {seen}",
    ),
    ("distributed/launch_check.py", "every rank must be there once, but the ranks are {ranks}"),
}
PROPER_NAMES = ("DeepSpeed", "FSDP", "WORLD_SIZE", "HF_HUB_OFFLINE", "PyTorch", "CUDA", "SLURM", "ZeRO", "BPE")


@dataclass(frozen=True)
class Raised:
    """One place where an error is made; {...} stands for what is known only then, None for what is not said."""

    file: str
    line: int
    kind: str
    what: str
    where: str | None
    hint: str | None

    @property
    def name(self) -> tuple[str, str]:
        return self.file, self.what

    def row(self) -> str:
        message = self.what if self.where is None else f"{self.where}: {self.what}"
        return f"{self.file}:{self.line} | {message} | {self.hint or ''} | {KINDS[self.kind].exit_code}"


def text_of(node: ast.expr | None) -> str | None:
    """The text that an expression makes, as far as it stands in the code."""
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return None
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"  # type: ignore[attr-defined]
            for part in node.values
        )
    return f"{{{ast.unparse(node)}}}"


def every_error(package: Path = PACKAGE) -> list[Raised]:
    """Every call of a ClozeError in the package."""
    found = []
    for path in sorted(package.rglob("*.py")):
        if path.name == "errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS:
                said = {keyword.arg: text_of(keyword.value) for keyword in node.keywords}
                what = text_of(node.args[0]) if node.args else said.get("what")
                file = path.relative_to(package).as_posix()
                found.append(Raised(file, node.lineno, node.func.id, what or "", said.get("where"), said.get("hint")))
    return found


ERRORS = every_error()


def test_every_error_says_what_to_do():
    without = {error.name for error in ERRORS if error.hint is None and not SAYS_WHAT_TO_DO.search(error.what)}
    assert without == WITHOUT_HINT


def test_every_error_says_where():
    assert {error.name for error in ERRORS if error.where is None} == WITHOUT_PLACE


@pytest.mark.parametrize("part", ["what", "hint"])
def test_messages_are_parts_of_one_line(part: str):
    """`cloze: error: WHERE: WHAT; HINT`: so no sentence of its own, with a capital and a full stop."""
    for error in ERRORS:
        text = getattr(error, part) or "x"
        assert text, error.row()
        assert not re.search(r"[^.][.!]$", text), error.row()
        assert text[0].islower() or not text[0].isalpha() or text.startswith(PROPER_NAMES), error.row()
        assert "\n" not in text, error.row()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"ClozeError", "LostRank"}))
def test_every_kind_is_in_use_and_ends_with_exit_code_2(kind: str):
    assert kind in {error.kind for error in ERRORS}
    assert KINDS[kind].exit_code == 2


def test_an_error_without_hint_or_place_would_be_noticed(tmp_path: Path):
    (tmp_path / "new.py").write_text('raise DataError(f"no field {name}")\n')
    assert every_error(tmp_path) == [Raised("new.py", 1, "DataError", "no field {name}", None, None)]


if __name__ == "__main__":
    print("where in the code | message | hint | exit code")
    print("\n".join(error.row() for error in ERRORS))
