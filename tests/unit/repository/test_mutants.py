"""The mutation harness makes the changes it promises, each valid source, and records what tests run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

sys.path.insert(0, str(ROOT / "tests" / "mutation"))

import hits
from mutants import mutants_of
from patch import function_of, replace
from record import Coverage
from run import MODULES, Answers, equivalent

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


BRANCHES = """
def sign(value):
    if value == 0:
        return 0
    elif value > 0:
        found = 1
    else:
        found = -9
        for _ in range(3):
            found = max(found, -1)
    return found
"""


def test_every_line_of_equivalent_txt_names_a_mutant_that_exists():
    named = equivalent()
    modules = {name.partition(" ")[0] for name in named}
    sources = {module: (ROOT / "src" / "cloze" / f"{module}.py").read_text() for module in modules}
    exist = {mutant.name for module, source in sources.items() for mutant in mutants_of(module, source)}
    assert named.keys() - exist == set()
    assert all(named.values()), "each with a reason"


def test_a_recorded_module_does_what_the_module_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLOZE_HITS", str(tmp_path / "hits"))
    names: dict = {}
    exec(compile(hits.instrumented("box", BRANCHES), "box", "exec"), names)
    assert names["sign"](-2) == -1
    lines = [line.split("\t") for line in (tmp_path / "hits").read_text().splitlines()]
    assert all(kind == "hit" and "test_a_recorded_module_does" in test for kind, test, _ in lines)
    run = [block.removeprefix("box ") for _, _, block in lines]
    mutants = mutants_of("box", BRANCHES)
    never = [mutant.block for mutant in mutants if mutant.after == "False"]
    by_text = {mutant.text: mutant.block for mutant in mutants if mutant.after != "False"}
    texts = ["if value == 0:", "elif value > 0:", "found = -9", "found = max(found, -1)"]
    assert run == [by_text[text] for text in texts]
    assert by_text["return 0"] not in run
    assert by_text["found = 1"] not in run
    assert never == [by_text["return 0"], by_text["found = 1"]]


IMPORTED = """
from functools import cache, cached_property
LIMIT = 3
@cache
def area():
    return 3 * 7
def bound(value=4):
    def inner(other):
        return other + 1
    return min(inner(value), LIMIT)
class Box:
    @cached_property
    def size(self):
        return 2 * 5
"""


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("other + 1", "other - 1", (0, 10, 21)),
        ("2 * 5", "2 / 5", (2, 0.4, 21)),
        ("3 * 7", "3 / 7", (2, 10, 3 / 7)),
        ("LIMIT = 3", "", None),
        ("value=4", "", None),
    ],
)
def test_a_mutant_is_put_into_functions_that_are_already_imported(before: str, after: str, found: tuple | None):
    names: dict = {"__name__": "cloze.box"}
    exec(compile(IMPORTED, "elsewhere", "exec"), names)
    bound, box, area = names["bound"], names["Box"](), names["area"]  # as if another module had imported them
    assert area() == 21  # is cached
    mutants = [one for one in mutants_of("box", IMPORTED) if before in one.text and (not after or one.after == after)]
    if found is None:
        assert {function_of(one, IMPORTED) for one in mutants} == {None}
    else:
        assert replace(mutants[0], IMPORTED)
        assert (bound(1), box.size, area()) == found


(SHARE,) = {one.block for one in mutants_of("box", SOURCE) if one.after == "min(values)"}
RECORD = f"""\
file\ttests/a.py\told
passed\ttests/a.py::gone\t1.0
hit\ttests/a.py::gone (call)\tbox {SHARE}
file\ttests/a.py\tnew
hit\ttests/a.py::slow (call)\tbox {SHARE}
passed\ttests/a.py::slow\t2.0
hit\ttests/a.py::fast (setup)\tbox {SHARE}
passed\ttests/a.py::fast\t0.5
file\ttests/b.py\told
passed\ttests/b.py::removed\t0.2
hit\ttests/b.py::removed (call)\tbox {SHARE}
hit\ttests/a.py::broken (call)\tbox {SHARE}
failed\ttests/a.py::broken\t0.1
"""


def test_a_mutant_is_tried_with_current_and_passing_tests_of_its_block_the_fastest_first(tmp_path: Path):
    (tmp_path / "hits").write_text(RECORD)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").touch()
    coverage = Coverage.read(tmp_path / "hits", tmp_path)
    (mutant,) = [one for one in mutants_of("box", SOURCE) if one.after == "min(values)"]
    assert coverage.of(mutant) == ["tests/a.py::fast", "tests/a.py::slow"]
    (elsewhere,) = [one for one in mutants_of("other", SOURCE) if one.after == "min(values)"]
    assert coverage.of(elsewhere) == []
    changed = SOURCE.replace("total: int = 4", "total: int = 5")
    (mutant,) = [one for one in mutants_of("box", changed) if one.after == "min(values)"]
    assert coverage.of(mutant) == ["tests/a.py::fast", "tests/a.py::slow"], "as its function was not recorded"
    (tmp_path / "hits").write_text(f"{RECORD}file\ttests/c.py\tx\npassed\ttests/c.py::new\t0.1\n")
    with (tmp_path / "hits").open("a") as file:
        file.write(f"hit\ttests/c.py::new (call)\tbox {mutant.block}\n")
    (tmp_path / "tests" / "c.py").touch()
    found = Coverage.read(tmp_path / "hits", tmp_path).of(mutant)
    assert found == ["tests/c.py::new", "tests/a.py::fast", "tests/a.py::slow"], "recorded for one file only"


def test_tests_of_one_file_give_way_to_cheaper_ones_of_others(tmp_path: Path):
    seconds = {"a.py::one": 1.0, "a.py::two": 1.1, "b.py::one": 3.0, "b.py::two": 0.1, "c.py::one": 1.6}
    lines = ["file\ta.py\tx", "file\tb.py\tx", "file\tc.py\tx"]
    for test, value in seconds.items():
        phase = "(setup)" if test == "b.py::one" else "(call)"
        lines += [f"passed\t{test}\t{value}", f"hit\t{test} {phase}\tbox {SHARE}"]
    (tmp_path / "hits").write_text("\n".join(lines))
    for name in "abc":
        (tmp_path / f"{name}.py").touch()
    (mutant,) = [one for one in mutants_of("box", SOURCE) if one.after == "min(values)"]
    order = ["a.py::one", "c.py::one", "a.py::two", "b.py::one", "b.py::two"]
    assert Coverage.read(tmp_path / "hits", tmp_path).of(mutant) == order, (
        "b.py's second test needs the first's fixture"
    )


def test_an_answer_is_kept_until_the_tests_of_a_surviving_mutant_change(tmp_path: Path):
    answers = Answers(tmp_path / "answers")
    answers.add("one", "tests-1", killed=True)
    answers.add("two", "tests-1", killed=False)
    again = Answers(tmp_path / "answers")
    assert [again.known("one", "tests-2"), again.known("two", "tests-1"), again.known("two", "tests-2")] == [
        True,
        False,
        None,
    ]


@pytest.mark.slow
def test_a_test_that_fails_without_the_mutation_does_not_kill_a_mutant(tmp_path: Path):
    (tmp_path / "test_it.py").write_text(
        "def test_broken():\n    assert 1 + 1 == 3\ndef test_sound():\n    import cloze.checkpoint.checksum\n"
    )
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "mutation")!r})
import queue
from pathlib import Path
from mutants import Mutant
from trial import work_on
planted = Mutant("checkpoint/checksum", "", "", 1, 0, (1, 3), "", "pass", "")  # not valid Python: the import fails
todo, answers = queue.Queue(), queue.Queue()
todo.put((0, planted, ["test_it.py::test_broken"], 1.0))
todo.put((1, planted, ["test_it.py::test_broken", "test_it.py::test_sound"], 1.0))
todo.put(None)
work_on(todo, answers, Path({str(tmp_path / "work")!r}), False, Path({str(tmp_path)!r}))
print([answers.get(), answers.get()])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[(0, False), (1, True)]", done.stderr
