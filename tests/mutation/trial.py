"""Tries mutants: one process per core imports what it can, and runs the tests of each mutant in a fork.

For most mutants it can import everything, tests included, because their code is put into the imported functions. For
mutants that change what an import does (constants, defaults, decorators), it imports only the libraries.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from mutants import Mutant
from patch import replace
from record import ROOT, TESTS, copy_of_package

PRELOADED = ("torch", "transformers", "datasets", "accelerate", "deepspeed", "hypothesis", "numpy", "pytest")
OPTIONS = ("-p", "no:cacheprovider", "-p", "no:xdist")
KILLED_BY_TIME = -1


def work_on(
    queue: multiprocessing.Queue, answers: multiprocessing.Queue, folder: Path, imported: bool, root: Path = ROOT
) -> None:
    """Take (index, mutant, tests, seconds of the tests) from `queue`; put (index, whether it was killed, or an error)
    into `answers`.

    `imported`: whether to import the package and the tests, or only the libraries. The names of tests are pytest's,
    relative to `root`.
    """
    os.environ.update(copy_of_package(folder))
    sys.dont_write_bytecode = False  # keep compiled tests
    sys.path[:0] = [str(folder / "src")]
    os.chdir(root)
    for name in PRELOADED:
        importlib.import_module(name)
    import pytest
    import torch

    torch.set_num_threads(1)
    assert not any(name.partition(".")[0] == "cloze" for name in sys.modules)
    if imported:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            pytest.main(["--collect-only", "-q", *OPTIONS, *(name for name in TESTS if Path(name).exists())])
    trial = Trial(folder, imported)
    for index, mutant, tests, seconds in iter(queue.get, None):
        trial.limit = 30 + 5 * seconds
        try:
            answers.put((index, trial.kills(mutant, tests)))
        except LookupError as error:
            answers.put((index, str(error)))


class Trial:
    """Runs tests on mutants that are written into the copy of the package in `folder`."""

    def __init__(self, folder: Path, imported: bool):
        self._folder, self._imported = folder, imported
        self.limit = 300.0  # seconds after which tests are stopped: some mutants never end
        self._written_now: tuple[Mutant, str] | None = None  # the mutant and its module's source without it
        self._sound: dict[str, bool] = {}  # test -> whether it passes here without a mutation

    def kills(self, mutant: Mutant, tests: list[str]) -> bool:
        """Return whether a test fails with the mutation and passes without it.

        The tests of the first file run first, because collecting many files takes longer than most of their tests.
        """
        if not tests:
            return False
        first = [test for test in tests if test.partition("::")[0] == tests[0].partition("::")[0]]
        rest = [test for test in tests if test not in set(first)]
        return self._fails(mutant, first) or self._fails(mutant, rest)

    def _fails(self, mutant: Mutant, tests: list[str]) -> bool:
        tests = [test for test in tests if self._sound.get(test, True)]
        while tests:
            with self._written(mutant):
                code, failed = self._run(tests)
            if code in (0, 5):  # all passed, or none was collected
                return False
            if failed is None:  # collection failed, pytest itself ended, or time ran out
                code, failed = self._run(tests)
                if code == 4:
                    raise LookupError((self._folder / "log").read_text())  # pytest does not find a test
                if failed is None:
                    return code in (0, 5)
            if failed not in self._sound:
                self._sound[failed] = self._run([failed])[0] == 0
            if self._sound[failed]:
                return True
            tests.remove(failed)
        return False

    @contextlib.contextmanager
    def _written(self, mutant: Mutant):
        """Write a mutant while the block runs. Bytecode is removed: Python misses changes within the same second."""
        path = self._folder / "src" / "cloze" / f"{mutant.module}.py"
        source = path.read_text()
        cached = Path(importlib.util.cache_from_source(path))
        try:
            path.write_text(mutant.apply(source))
            cached.unlink(missing_ok=True)
            self._written_now = mutant, source
            yield
        finally:
            self._written_now = None
            path.write_text(source)
            cached.unlink(missing_ok=True)

    def _run(self, tests: list[str]) -> tuple[int, str | None]:
        """Run tests in a fork; return pytest's exit code, and the name of the first test that failed, or None."""
        verdict = self._folder / "failed"
        verdict.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            self._run_here(tests, verdict)
        code = _wait(pid, self.limit)
        return code, verdict.read_text() if verdict.exists() else None

    def _run_here(self, tests: list[str], verdict: Path) -> None:
        os.setsid()
        log = os.open(self._folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        import pytest

        class FirstFailure:
            def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                if report.failed:
                    verdict.write_text(report.nodeid)

        code = 99
        try:
            if self._imported and self._written_now is not None:
                mutant, source = self._written_now
                name = f"cloze.{mutant.module.replace('/', '.')}"
                assert replace(mutant, source) or name not in sys.modules, mutant.name
            code = int(pytest.main([*tests, *OPTIONS, "-x", "-q"], plugins=[FirstFailure()]))
        finally:
            os._exit(code)


def _wait(pid: int, seconds: float) -> int:
    """Wait for a process, at most so many seconds, and kill its group. Return its exit code."""
    deadline = time.monotonic() + seconds
    code = KILLED_BY_TIME
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if code == KILLED_BY_TIME:
        os.waitpid(pid, 0)
    return code
