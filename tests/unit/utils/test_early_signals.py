"""A signal at any moment of a command's start and end: one line at most, and the exit code that later moments have."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from cloze.utils.early_signals import is_importing, is_sent_again, leave_on_signals, signal_again

# A real signal to this process at an import, or at the end; the console script is these last two lines too.
SCRIPT = """
import os, signal, sys
moment, number, sys.argv = sys.argv[1], int(sys.argv[2]), ["cloze", *sys.argv[3:]]
sent = []
def watch(event, arguments):
    if not sent and event == "import" and arguments[0] == moment:
        sent.append(1)
        os.kill(os.getpid(), number)
sys.addaudithook(watch)
if moment == "end":
    import atexit
    atexit.register(os.kill, os.getpid(), number)
from cloze.cli import run
run()
"""
TRAIN = ["train", "--model_type", "roberta", "--dataset_name", "missing", "--output_dir", "missing/out"]


def signalled(moment: str, number: int, *words: str) -> tuple[int, str]:
    """Return the exit code and stderr of `cloze WORDS` that gets a signal when it first imports a module."""
    argv = [sys.executable, "-c", SCRIPT, moment, str(int(number)), *words]
    done = subprocess.run(argv, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("moment", "number", "words", "code", "line"),
    [
        ("cloze.cli.command_line", signal.SIGINT, ["--version"], 130, "cloze: interrupted\n"),
        ("cloze.config.parser", signal.SIGINT, ["train", "--help"], 130, "cloze: interrupted\n"),
        ("cloze.training.trainer", signal.SIGTERM, TRAIN, 75, "cloze: SIGTERM: stopped before it began\n"),
        ("numpy", signal.SIGINT, TRAIN, 130, "cloze: interrupted\n"),
        ("end", signal.SIGINT, ["--version"], 0, ""),
    ],
)
def test_a_signal_during_imports_or_at_the_end_is_one_line_at_most(moment, number, words, code, line):
    assert signalled(moment, number, *words) == (code, line)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_at_any_import_is_one_line_at_most(number: int):
    """Each signal comes at every 120th module that `cloze train` imports, from its own offset: some are in the middle
    of torch, numpy and transformers."""
    listing = "import sys, cloze.cli.commands.train\nprint(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True).stdout.split()
    first = names.index("cloze.cli.commands")
    offset = 40 * [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1].index(number)
    for name in names[first + offset :: 120]:
        code, said = signalled(name, number, *TRAIN)
        # Names that importlib.import_module imports send no signal: then the missing data ends the command.
        assert code in (130 if number == signal.SIGINT else 75, 2), (name, said)
        assert said.count("\n") <= 1, (name, said)  # none before Cloze can know the rank


def test_a_signal_during_an_import_of_a_running_command_waits_for_the_end_of_the_import(tmp_path, monkeypatch):
    (tmp_path / "slow_module.py").write_text(
        "import os, signal, sys\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.modules['reached'] = sys.modules[__name__]\n"
    )
    raised: list[bool] = []

    def handle(number, frame):
        is_sent_again(number)
        if is_importing(frame):
            signal_again(number)
            return
        raised.append("reached" in sys.modules)
        raise KeyboardInterrupt

    def wait_in_import():
        import slow_module  # noqa: F401

        signal.pause()

    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(signal.SIGTERM, handle)
    try:
        with pytest.raises(KeyboardInterrupt):
            wait_in_import()
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.modules.pop("reached", None)
    assert raised == [True]


def test_ignored_signals_stay_ignored():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        leave_on_signals()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, before[signal.SIGTERM])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
