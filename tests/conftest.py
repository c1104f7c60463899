"""Fixtures that every test may use."""

from __future__ import annotations

import fcntl
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for processes that tests start: several share a core

import pytest
import torch
from repository import ROOT

# Who starts tests in the background of a script has Ctrl-C ignored in all of their processes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Threads of OpenMP do not survive a fork, and a rank that is forked would wait for them for ever: so this process,
# whose forks the ranks are (see `ranks`), never has any.
torch.set_num_threads(1)


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, float], None]:
    """Note a measured figure; the largest of each name is shown when the tests are done, for README's table."""
    return lambda name, value: record_property(f"figure {name}", float(value))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures: dict[str, list[float]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in getattr(report, "user_properties", []):
            if name.startswith("figure "):
                figures.setdefault(name.removeprefix("figure "), []).append(value)
    if figures:
        terminalreporter.section("measured here: the largest of each")
    for name, values in sorted(figures.items()):
        terminalreporter.write_line(f"{max(values):10.2g}  {name} ({len(values)} times)")


@pytest.fixture
def most_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run one test at a time of those that need more than half of a machine with 24 GB."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with open(shared / "most-memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(autouse=True)
def no_state_of_accelerate_is_left() -> Iterator[None]:
    """A test that made an Accelerator in this process leaves nothing of it to the ranks that later tests fork."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real ELI5 records and the real RoBERTa and BERT tokenizers, kept outside of the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not here: {folder}")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared folder: blocks of 32 tokens of the sample corpus, with validation blocks."""
    from corpus import make_prepared

    return make_prepared(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def muon_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Muon orthogonalize in fp32, so that two splits can be compared.

    Muon rounds its momentum to bf16. Two splits differ in the last bits of fp32; at the border between two bf16 values
    this changes an element of the update by 2^-8 of it, and the loss by more than fp32 rounding explains.
    """
    from pytorch_optimizer.optimizer.utils import matrix

    function = matrix.zero_power_via_newton_schulz_5
    names = list(inspect.signature(function).parameters)
    place = names.index("dtype") - len(names)
    defaults = list(function.__defaults__)
    assert defaults[place] == torch.bfloat16
    defaults[place] = torch.float32
    monkeypatch.setattr(function, "__defaults__", tuple(defaults))
