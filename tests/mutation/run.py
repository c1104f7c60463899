"""The mutation score: what share of small changes in the modules that determine a run's numbers some test notices.

    python tests/mutation/run.py                       # every module below; hours on two cores
    python tests/mutation/run.py training/optim/lr_schedule      # some of them
    python tests/mutation/run.py --sample 0.1          # a tenth of the mutants, always the same tenth

First `record.py` records which tests run which blocks of statements. Then each mutant is written into a copy of the
package, and the tests that run its block run there, the fastest first, until one fails. A test that also fails there
without the mutation proves nothing and is ignored. `equivalent.txt` lists the mutants that no test could detect, with
the reason. A mutant is tried again if its function has changed, or if it survived and its tests have changed.
Ctrl-C ends a run early and prints the score of the mutants that have been tried so far.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutants import Mutant, functions_of, mutants_of
from patch import function_of
from record import HERE, ROOT, Coverage, update_record
from trial import work_on

MODULES = (
    "data/batches/sampler",
    "data/batches/masking",
    "data/prepared/packing",
    "data/batches/loader",
    "data/batches/make_batch",
    "data/batches/layout",
    "data/batches/collator",
    "data/batches/collator",
    "data/batches/word_boundaries",
    "data/batches/batch_size_warmup",
    "training/optim/lr_schedule",
    "training/loss",
    "training/engines/base",
    "training/engines/ddp",
    "training/engines/deepspeed",
    "training/optim/optimizers",
    "training/engines/sharded_state",
    "training/checkpointing/restore",
    "checkpoint/reader",
    "training/checkpointing/saver",
    "checkpoint/format",
    "training/engines/ema",
    "training/engines/gradients",
    "checkpoint/checksum",
    "training/nonfinite",
    "training/engines/loss_scale",
    "evaluation/perplexity",
    "evaluation/pll",
    "evaluation/intervals",
    "evaluation/vocabulary",
    "export/consolidation/stored",
    "model/sparse_head",
    "model/sparse_loss",
    "model/packed",
)


class Answers:
    """The results of earlier runs, in a file of lines "killed KEY" and "survived KEY DIGEST_OF_TESTS"."""

    def __init__(self, path: Path):
        self._path = path
        self._known = set(path.read_text().splitlines()) if path.exists() else set()

    def line(self, key: str, tests: str, killed: bool) -> str:
        """Return the line for an answer. `tests`: the digest of the tests that were run."""
        return f"killed {key}" if killed else f"survived {key} {tests}"

    def known(self, key: str, tests: str) -> bool | None:
        """Return whether a mutant was killed, or None if it must be tried."""
        found = [killed for killed in (True, False) if self.line(key, tests, killed) in self._known]
        return found[0] if found else None

    def add(self, key: str, tests: str, killed: bool) -> None:
        """Append an answer to the file."""
        with self._path.open("a") as file:
            file.write(self.line(key, tests, killed) + "\n")


def equivalent() -> dict[str, str]:
    """Return the reasons of `equivalent.txt` by the names of the mutants."""
    found = {}
    for line in (HERE / "equivalent.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, separator, reason = line.rpartition("  # ")
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


def try_all(
    mutants: list[tuple[Mutant, list[str], float]], work: Path, on_answer: Callable[[int, bool | str], None]
) -> None:
    """Try all mutants, each with its tests and their seconds, on one worker per core; report answers as they come."""
    sources = {module: (ROOT / "src" / "cloze" / f"{module}.py").read_text() for module in MODULES}
    in_function = [function_of(mutant, sources[mutant.module]) is not None for mutant, *_ in mutants]
    for imported in (True, False):
        some = [index for index in range(len(mutants)) if in_function[index] is imported]
        try_some([(index, *mutants[index]) for index in some], work / str(imported), imported, on_answer)


def try_some(
    mutants: list[tuple[int, Mutant, list[str]]],
    work: Path,
    imported: bool,
    on_answer: Callable[[int, bool | str], None],
) -> None:
    """Try mutants with workers that have imported the package (`imported`), or only the libraries."""
    context = multiprocessing.get_context("spawn")
    queue, answers = context.Queue(), context.Queue()
    for one in mutants:
        queue.put(one)
    folders = [work / f"worker-{core}" for core in range(min(os.cpu_count() or 1, len(mutants)))]
    workers = [context.Process(target=work_on, args=(queue, answers, folder, imported)) for folder in folders]
    for worker in workers:
        queue.put(None)
        worker.start()
    try:
        for _ in mutants:
            on_answer(*answers.get())
    finally:
        queue.cancel_join_thread()  # do not wait until the workers take what is left
        for worker in workers:
            worker.terminate()


def main() -> int:
    """Run the command; return 1 if a mutant survives that `equivalent.txt` does not name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=MODULES, help="such as training/loss; all of them if none")
    parser.add_argument("--sample", type=float, default=1.0, help="the share of the mutants to try")
    parser.add_argument("--answers", type=Path, default=ROOT / "build" / "mutation", help="folder of kept answers")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the workers are ended too
    unknown = [name for name in arguments.modules if name not in MODULES]
    if unknown:
        parser.error(f"unknown modules: {', '.join(unknown)}; they are {', '.join(MODULES)}")
    arguments.answers.mkdir(parents=True, exist_ok=True)
    excused = equivalent()
    update_record(MODULES, arguments.answers / "blocks")
    coverage = Coverage.read(arguments.answers / "blocks")
    answers = Answers(arguments.answers / "answers")
    chosen = choose(arguments.modules, arguments.sample)
    tests = {key: coverage.of(mutant) for key, mutant in chosen.items()}
    marks = {key: coverage.mark(tests[key]) for key in chosen}
    verdicts = {key: answers.known(key, marks[key]) for key in chosen}
    # In the order of the keys, which is random: the time left can be estimated, and a part of a run is a fair sample.
    to_try = sorted(key for key in chosen if verdicts[key] is None and chosen[key].name not in excused)
    start, tried = time.monotonic(), 0

    def note(index: int, killed: bool | str) -> None:
        nonlocal tried
        if isinstance(killed, str):
            raise SystemExit(killed)
        key = to_try[index]
        verdicts[key] = killed
        answers.add(key, marks[key], killed)
        if not killed:
            print(f"survived: line {chosen[key].line} of {chosen[key].name}", flush=True)
        tried += 1
        if tried % 50 == 0:
            left = (time.monotonic() - start) / tried * (len(to_try) - tried)
            print(f"{tried} of {len(to_try)}, about {left / 60:.0f} min left", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        try:
            try_all([(chosen[key], tests[key], coverage.total(tests[key])) for key in to_try], Path(folder), note)
        except KeyboardInterrupt:
            reached = max((key for key in to_try if verdicts[key] is not None), default="")
            before = [key for key in sorted(chosen) if key <= reached]
            chosen = {key: chosen[key] for key in before if verdicts[key] is not None or chosen[key].name in excused}
            print(f"stopped: {len(chosen)} of the first {len(before)} mutants have been tried")
    return report(chosen, verdicts, excused)


def report(chosen: dict[str, Mutant], verdicts: dict[str, bool | None], excused: dict[str, str]) -> int:
    """Print a row for each module and the total; return the exit code."""
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for key, mutant in chosen.items():
        row = rows[mutant.module]
        same = mutant.name in excused and not verdicts[key]
        row[0] += 1
        row[1] += verdicts[key] is True
        row[2] += same
        row[3] += verdicts[key] is False and not same
    print(f"{'module':<28}{'mutants':>8}{'killed':>8}{'equivalent':>12}{'survived':>10}{'score':>8}")
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    for name, (mutants, killed, same, survived) in [*rows.items(), ("all", total)]:
        score = 100 * killed / max(mutants - same, 1)
        print(f"{name:<28}{mutants:>8}{killed:>8}{same:>12}{survived:>10}{score:>7.1f}%")
    return 1 if total[3] else 0


if __name__ == "__main__":
    sys.exit(main())
