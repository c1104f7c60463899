"""Records which tests run which blocks of statements and how long each test takes; repeats only test files that
changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import hits
from mutants import Mutant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TESTS = ("tests/unit", "tests/invariants", "tests/reference", "tests/pairwise", "tests/distributed")
SECONDS_PER_MUTANT = 60.0  # the limit for a mutant's tests, by their time without a mutation


@dataclass
class Coverage:
    """Which tests run which block, and how long each test takes in seconds."""

    tests: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # by "module block"
    seconds: dict[str, float] = field(default_factory=dict)
    setups: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # tests whose setup runs a block
    failed: set[str] = field(default_factory=set)
    marks: dict[str, str] = field(default_factory=dict)  # the digest of each test file when it was recorded

    @classmethod
    def read(cls, path: Path, root: Path = ROOT) -> Coverage:
        """Read what `hits` recorded; if a file was recorded more than once, the last record counts. Blocks that the
        setup of a test runs count for every test of its file. Tests that fail without a mutation are left out, and so
        are those of files that no longer exist below `root`."""
        lines = [line.split("\t") for line in path.read_text().splitlines()]
        begin = {name: number for number, (kind, name, _) in enumerate(lines) if kind == "file"}
        coverage = cls(marks={name: value for kind, name, value in lines if kind == "file"})
        gone = {name for name in coverage.marks if not (root / name).exists()}
        for number, (kind, test, value) in enumerate(lines):
            name = test.partition("::")[0]
            if kind == "file" or name in gone or number < begin.get(name, 0):
                continue
            if kind in ("passed", "failed"):
                coverage.seconds[test] = float(value)
                (coverage.failed.add if kind == "failed" else coverage.failed.discard)(test)
            else:
                test, _, phase = test.rpartition(" ")
                coverage.tests[value].add(test)
                if phase != "(call)":
                    coverage.setups[value].add(test)
        for test in coverage.failed:
            coverage.seconds.pop(test, None)
        of_file = defaultdict(set)
        for test in coverage.seconds:
            of_file[test.partition("::")[0]].add(test)
        for block, tests in coverage.setups.items():
            coverage.tests[block] |= {other for test in tests for other in of_file[test.partition("::")[0]]}
        return coverage

    def of(self, mutant: Mutant) -> list[str]:
        """Return the tests that run a mutant's block; those that run its function if that has changed since it was
        recorded, and those that run its module if the mutant is outside of functions.

        Those in the module's own test file come first. The others are ordered by the seconds that
        they and the earlier tests of their file take, because tests of one file have much in common. If a fixture runs
        the block, the test that set it up comes first in its file.
        """
        key, function = f"{mutant.module} {mutant.block}", mutant.block.rpartition("+")[0]
        start = f"{mutant.module} {mutant.function}{'@' if mutant.function else ''}"
        keys = [other for other in self.tests if other.startswith(start)]
        current = [other for other in keys if mutant.block and other.startswith(f"{mutant.module} {function}+")]
        files = {test.partition("::")[0] for other in current for test in self.tests[other]}
        tests = set(self.tests.get(key, ()))
        for other in set(keys) - set(current):  # of the function as it was, or of all functions of the module
            tests |= {test for test in self.tests[other] if test.partition("::")[0] not in files}
        tests &= self.seconds.keys()
        setups = {test for other in keys for test in self.setups.get(other, ())}
        folder, slash, module = mutant.module.rpartition("/")
        own = f"tests/unit/{folder}{slash}test_{module}.py"
        order, of_file = [], Counter[str]()
        for test in sorted(tests, key=lambda test: (test not in setups, self.seconds[test], test)):
            name = test.partition("::")[0]
            of_file[name] += self.seconds[test] + 0.05
            order.append((name != own, of_file[name], test))
        total, chosen = 0.0, []
        for _, _, test in sorted(order):
            total += self.seconds[test] + 0.02
            if total > SECONDS_PER_MUTANT and chosen:
                break
            chosen.append(test)
        return chosen

    def total(self, tests: list[str]) -> float:
        """Return how many seconds the tests take."""
        return sum(self.seconds[test] for test in tests)

    def mark(self, tests: list[str]) -> str:
        """Return a digest of the tests' names and of the files that contain them."""
        names = sorted({test.partition("::")[0] for test in tests})
        text = "\n".join([*tests, *(f"{name} {self.marks.get(name)}" for name in names)])
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def copy_of_package(folder: Path) -> dict[str, str]:
    """Copy `src` into `folder`; return the environment variables with which Python imports the copy."""
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    paths = [str(folder / "src"), str(HERE)]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "", "DS_ACCELERATOR": "cpu"}


def update_record(modules: tuple[str, ...], record: Path) -> None:
    """Run the test files that are not yet in `record` or have changed, and append which blocks they run.

    They run in an instrumented copy of the package. Tests that fail there (torch cannot compile a recording function)
    run again in a plain copy.
    """
    known = set(record.read_text().splitlines()) if record.exists() else set()
    marks = {str(path.relative_to(ROOT)): digest(path) for path in test_files()}
    changed = [name for name, mark in marks.items() if f"file\t{name}\t{mark}" not in known]
    if not changed:
        return
    print(f"recording which blocks {len(changed)} test files run", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        plain, instrumented = copy_of_package(Path(folder, "plain")), copy_of_package(Path(folder, "instrumented"))
        for module in modules:
            path = Path(folder, "instrumented", "src", "cloze", f"{module}.py")
            path.write_text(hits.instrumented(module, path.read_text()))
        partial = record.with_suffix(".partial")
        partial.write_text("".join(f"file\t{name}\t{marks[name]}\n" for name in changed))
        run_tests_recorded(changed, {**instrumented, "CLOZE_HITS": str(partial)})
        again = sorted(Coverage.read(partial).failed)
        if again:
            run_tests_recorded(again, {**plain, "CLOZE_HITS": str(partial)})
        with record.open("a") as file:
            file.write(partial.read_text())


def test_files() -> list[Path]:
    """Return all test files in sorted order."""
    return sorted(path for name in TESTS for path in (ROOT / name).rglob("test_*.py"))


def digest(path: Path) -> str:
    """Return a digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def run_tests_recorded(tests: list[str], variables: dict[str, str]) -> None:
    """Run tests on two workers with the recording plugin."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "hits", "-n", "2", "--dist", "loadscope", *tests]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, check=False)
