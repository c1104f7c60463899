"""The mutation score: what share of small changes in the modules that determine a run's numbers some test notices.

    python tests/mutation/run.py                       # every module below; hours on two cores
    python tests/mutation/run.py train/schedule        # some of them
    python tests/mutation/run.py --sample 0.1          # a tenth of the mutants, always the same tenth

First the tests run once, in a copy of the package that records which test runs which function. Then each mutant is
written into a copy of the package, and the tests that run its function run there, the quickest first, until one fails.
`equivalent.txt` names the mutants that change nothing a test could see, with the reason. A mutant that
was killed is not tried again until its function changes; those that survived are.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

import hits  # noqa: E402
from mutants import Mutant, functions_of, mutants_of  # noqa: E402

MODULES = (
    *("data/sampler", "data/masking", "data/packing", "data/loader", "data/collator", "data/words", "data/batch_size"),
    *("train/schedule", "train/loss", "train/engine", "train/optim", "train/state", "train/restore"),
    *("train/checkpoint", "train/checkpoint_files", "train/ema", "train/gradients", "train/sums", "train/nonfinite"),
    *("evaluation/perplexity", "evaluation/pll", "evaluation/intervals", "evaluation/vocabulary"),
    *("consolidate/stored", "model/sparse_head", "model/sparse_loss", "model/packed"),
)
TESTS = ("tests/unit", "tests/invariants", "tests/reference", "tests/distributed")
SECONDS_PER_MUTANT = 60.0  # of tests, by the time that they take without a mutation
PRELOADED = ("torch", "transformers", "datasets", "accelerate", "deepspeed", "hypothesis", "numpy", "pytest")


@dataclass
class Coverage:
    """Which tests run which function, and how long each test takes in seconds."""

    tests: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # by "module function"
    seconds: dict[str, float] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> Coverage:
        """Read what `hits` recorded. What the setup of a test runs counts for every test of its file."""
        coverage, shared = cls(), defaultdict(set)
        for line in path.read_text().splitlines():
            kind, test, value = line.split("\t")
            if kind in ("passed", "failed"):
                coverage.seconds[test] = float(value)
                (coverage.failed.add if kind == "failed" else coverage.failed.discard)(test)
            else:
                test, _, phase = test.rpartition(" ")
                coverage.tests[value].add(test)
                if phase != "(call)":
                    shared[value].add(test.partition("::")[0])
        for test in coverage.failed:  # a test that fails without a mutation shows nothing
            coverage.seconds.pop(test, None)
        for function, files in shared.items():
            coverage.tests[function] |= {test for test in coverage.seconds if test.partition("::")[0] in files}
        return coverage

    def of(self, mutant: Mutant) -> list[str]:
        """Return the tests that run a mutant's function, or its module if it is in none, the quickest first."""
        keys = [f"{mutant.module} {mutant.function}"]
        if keys[0] not in self.tests:
            prefix = f"{mutant.module} {mutant.function}"
            keys = [key for key in self.tests if key.startswith(prefix)]
        tests = {test for key in keys for test in self.tests[key]}
        ordered = sorted(tests & self.seconds.keys(), key=lambda test: (self.seconds[test], test))
        total, chosen = 0.0, []
        for test in ordered:
            total += self.seconds[test] + 0.02
            if total > SECONDS_PER_MUTANT and chosen:
                break
            chosen.append(test)
        return chosen


def copy_of_package(folder: Path) -> dict[str, str]:
    """Copy `src` into `folder`; return the variables with which Python imports the copy."""
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    paths = [str(folder / "src"), str(HERE)]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", "DS_ACCELERATOR": "cpu"}


def measure_coverage(work: Path, record: Path) -> None:
    """Run the tests once in an instrumented copy of the package, and write what they run to `record`.

    Those that fail there (torch cannot compile a recording function) run again in a plain copy.
    """
    partial = record.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    plain = copy_of_package(work / "plain")
    instrumented = copy_of_package(work / "instrumented")
    for module in MODULES:
        path = work / "instrumented" / "src" / "cloze" / f"{module}.py"
        path.write_text(hits.instrumented(module, path.read_text()))

    def run(tests: list[str], variables: dict[str, str]) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "hits", "-n", "2", "--dist", "loadscope", *tests]
        environment = {**os.environ, **variables, "CLOZE_HITS": str(partial)}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False)

    run([name for name in TESTS if (ROOT / name).exists()], instrumented)
    again = sorted(Coverage.read(partial).failed)
    if again:
        run(again, plain)
    partial.replace(record)


def run_tests(tests: list[str], log: Path) -> int:
    """Run tests in a fork of this process, in a process group of its own; return pytest's exit code, or -1 if killed
    after five times the seconds that were allowed."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        import pytest

        code = 99
        try:
            code = int(
                pytest.main([*tests, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout", "300"])
            )
        finally:
            os._exit(code)
    deadline = time.monotonic() + 5 * SECONDS_PER_MUTANT
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _kill(pid)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    _kill(pid)
    os.waitpid(pid, 0)
    return -1


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def work_on(queue: multiprocessing.Queue, answers: multiprocessing.Queue, folder: Path) -> None:
    """Take mutants from `queue` and put (index, verdict) into `answers`, from a process that has imported the
    libraries but nothing of the package."""
    os.environ.update(copy_of_package(folder))
    sys.path[:0] = [str(folder / "src")]
    sys.dont_write_bytecode = True
    os.chdir(ROOT)
    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    assert not any(name.partition(".")[0] == "cloze" for name in sys.modules)
    for index, mutant, tests in iter(queue.get, None):
        path = folder / "src" / "cloze" / f"{mutant.module}.py"
        source = path.read_text()
        path.write_text(mutant.apply(source))
        code = run_tests(tests, folder / "log") if tests else 0
        path.write_text(source)
        answers.put((index, "survived" if code in (0, 5) else "killed"))


def equivalent() -> dict[str, str]:
    """Return the reasons of `equivalent.txt` by the names of the mutants."""
    found = {}
    for line in (HERE / "equivalent.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, separator, reason = line.partition("  # ")
            if not separator:
                raise SystemExit(f"equivalent.txt: this line has no '  # reason': {line}")
            found[name] = reason
    return found


def choose(modules: list[str], sample: float) -> dict[str, Mutant]:
    """Return the mutants to try by a digest of their function and place, by which answers are kept."""
    chosen = {}
    for module in modules:
        source = (ROOT / "src" / "cloze" / f"{module}.py").read_text()
        functions = dict(functions_of(source))
        for mutant in mutants_of(module, source):
            if random.Random(mutant.name).random() >= sample:
                continue
            node = functions.get(mutant.function)
            body = ast.get_source_segment(source, node) if node else source
            line = mutant.line - (node.lineno if node else 0)
            key = hashlib.sha256(f"{body}\0{line}:{mutant.column}\0{mutant.after}".encode()).hexdigest()[:24]
            chosen[key] = mutant
    return chosen


def try_all(mutants: list[tuple[Mutant, list[str]]], work: Path, on_answer: Callable[[int, str], None]) -> None:
    """Try each mutant with its tests on a worker per core, and report each answer as it comes."""
    context = multiprocessing.get_context("spawn")
    queue, answers = context.Queue(), context.Queue()
    for index, (mutant, tests) in enumerate(mutants):
        queue.put((index, mutant, tests))
    folders = [work / f"worker-{core}" for core in range(os.cpu_count() or 1)]
    workers = [context.Process(target=work_on, args=(queue, answers, folder)) for folder in folders]
    for worker in workers:
        queue.put(None)
        worker.start()
    try:
        for _ in mutants:
            on_answer(*answers.get())
    finally:
        for worker in workers:
            worker.terminate()


def main() -> int:
    """Run the command; return 1 if a mutant survives that `equivalent.txt` does not name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=MODULES, help="such as train/schedule; all of them if none")
    parser.add_argument("--sample", type=float, default=1.0, help="the share of the mutants to try")
    parser.add_argument("--answers", type=Path, default=ROOT / "build" / "mutation", help="folder of kept answers")
    parser.add_argument("--again", action="store_true", help="record anew which test runs which function")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.modules if name not in MODULES]
    if unknown:
        parser.error(f"unknown modules: {', '.join(unknown)}; they are {', '.join(MODULES)}")
    arguments.answers.mkdir(parents=True, exist_ok=True)
    excused = equivalent()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        work = Path(folder)
        record = arguments.answers / "hits"
        if arguments.again or not record.exists():
            print("recording which test runs which function", flush=True)
            measure_coverage(work, record)
        coverage = Coverage.read(record)
        killed_before = (
            set((arguments.answers / "killed").read_text().split())
            if (arguments.answers / "killed").exists()
            else set()
        )
        chosen = choose(arguments.modules, arguments.sample)
        to_try = [key for key, mutant in chosen.items() if key not in killed_before and mutant.name not in excused]
        killed = killed_before & chosen.keys()
        survived: list[Mutant] = []
        start = time.monotonic()

        def note(index: int, verdict: str) -> None:
            mutant = chosen[to_try[index]]
            if verdict == "killed":
                killed.add(to_try[index])
                with (arguments.answers / "killed").open("a") as file:
                    file.write(to_try[index] + "\n")
            else:
                survived.append(mutant)
                print(f"survived: line {mutant.line} of {mutant.name}", flush=True)
            done = index + 1
            if done % 50 == 0:
                left = (time.monotonic() - start) / done * (len(to_try) - done)
                print(f"{done} of {len(to_try)}, about {left / 60:.0f} min left", flush=True)

        try_all([(chosen[key], coverage.of(chosen[key])) for key in to_try], work, note)
    return report(chosen, killed, survived, excused)


def report(chosen: dict[str, Mutant], killed: set[str], survived: list[Mutant], excused: dict[str, str]) -> int:
    """Print a row for each module and the total; return the exit code."""
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for key, mutant in chosen.items():
        row = rows[mutant.module]
        row[0] += 1
        row[1] += key in killed
        row[2] += mutant.name in excused and key not in killed
        row[3] += mutant in survived
    print(f"{'module':<28}{'mutants':>8}{'killed':>8}{'equivalent':>12}{'survived':>10}{'score':>8}")
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    for name, (tried, caught, same, left) in [*rows.items(), ("all", total)]:
        score = 100 * caught / max(tried - same, 1)
        print(f"{name:<28}{tried:>8}{caught:>8}{same:>12}{left:>10}{score:>7.1f}%")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
