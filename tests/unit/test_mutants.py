"""The mutation harness makes the changes it promises, each valid source, and records what tests run."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "mutation"))

import hits
from mutants import mutants_of
from run import MODULES, ROOT

SOURCE = '''"""A module."""
LIMIT = 3


class Box:
    def share(self, values: list[int], total: int = 4) -> float:
        """Return a share."""
        if total < 1 and not values:
            raise ValueError(f"{total - 1} is too small")
        self.kept = sorted(values, key=abs)
        return max(values) / total
'''


def changes() -> set[str]:
    return {f"{mutant.before} => {mutant.after}" for mutant in mutants_of("box", SOURCE)}


@pytest.mark.parametrize(
    "change",
    [
        "3 => 4",
        "4 => 5",
        "total < 1 => total <= 1",
        "total < 1 and not values => False",
        "total < 1 and not values => True",
        "total < 1 and not values => not values",
        "total < 1 and not values => total < 1 or not values",
        "not values => values",
        "self.kept = sorted(values, key=abs) => pass",
        "sorted(values, key=abs) => values",
        "sorted(values, key=abs) => sorted(values)",
        "max(values) / total => max(values) * total",
        "max(values) => min(values)",
    ],
)
def test_each_kind_of_change_is_made(change: str):
    assert change in changes()


def test_messages_annotations_and_docstrings_stay():
    assert not any("too small" in change or "total - 1" in change or "list" in change for change in changes())


def test_mutants_are_valid_and_another_source():
    for module in MODULES[::5]:
        source = (ROOT / "src" / "cloze" / f"{module}.py").read_text()
        tree = ast.dump(ast.parse(source))
        found = mutants_of(module, source)
        for mutant in found[:: max(1, len(found) // 10)]:
            assert ast.dump(ast.parse(mutant.apply(source))) != tree


def test_a_recorded_module_does_what_the_module_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLOZE_HITS", str(tmp_path / "hits"))
    names: dict = {}
    exec(compile(hits.instrumented("box", SOURCE), "box", "exec"), names)
    assert names["Box"]().share([1, 4], 2) == 2.0
    kind, test, function = (tmp_path / "hits").read_text().splitlines()[0].split("\t")
    assert (kind, function) == ("hit", "box Box.share")
    assert "test_a_recorded_module_does" in test
