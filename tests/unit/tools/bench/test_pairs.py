"""Comparisons in pairs: drift cancels, bursts are ignored or reported, and CPU time includes worker processes."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloze.tools.bench import train, worker_pipe
from cloze.tools.bench.interleave import peer_environment
from cloze.tools.bench.pairs import estimate, ratios, remark, steps_in_turn, turns

COSTS = st.lists(st.floats(0.01, 100.0), min_size=2, max_size=4)


@given(costs=COSTS, pairs=st.integers(1, 5), drift=st.floats(0.0, 1.0))
def test_a_machine_that_slows_down_does_not_change_ratios(costs: list[float], pairs: int, drift: float):
    seconds: dict[str, list[float]] = {name: [] for name in "abcd"[: len(costs)]}
    for number, name in enumerate(turns(list(seconds), pairs)):
        seconds[name].append(costs["abcd".index(name)] * (1 + drift * number))
    for one, cost in zip(seconds, costs, strict=True):
        found = ratios(seconds[one], seconds["a"], scale=2.0)
        assert found == pytest.approx([2 * cost / costs[0]] * pairs)


def test_peers_that_are_compared_take_neighbouring_turns():
    for absent in ("", "compiled"):
        order = list(turns([peer for peer in train.TURN_ORDER if peer != absent], pairs=2))
        neighbours = {frozenset(two) for two in itertools.pairwise(order)}
        for slow, fast in train.RATIOS.values():
            assert absent in (slow, fast) or {slow, fast} in neighbours
    assert set(train.TURN_ORDER) == set(train.PEERS)


def test_a_turn_is_one_step_unless_that_is_too_short_to_measure():
    assert [steps_in_turn(False, seconds) for seconds in (2.0, 0.05, 0.01, 0.001)] == [1, 1, 5, 50]
    assert [steps_in_turn(True, seconds) for seconds in (2.0, 0.1, 0.01)] == [5, 5, 50]
    assert (steps_in_turn(False), steps_in_turn(True)) == (1, 5)


def test_a_few_bursts_of_load_do_not_change_a_figure():
    found = estimate([1.7, 0.2, 1.7, 9.0, 1.7, 1.7, 30.0, 1.7, 1.7, 0.1, 1.7, 1.7, 0.01, 8.0, 1.7])
    assert found.median == 1.7
    assert found.interval == (1.7, 1.7)
    assert found.verdict() is None


@pytest.mark.parametrize(
    ("low", "high", "is_narrow"),
    [(1.0, 1.0, True), (0.951, 1.049, True), (0.949, 1.051, False), (0.89, 1.0, False), (1.0, 1.11, False)],
)
def test_an_interval_with_a_half_width_over_5_percent_is_reported(low: float, high: float, is_narrow: bool):
    found = estimate([low, 1.0, 1.0, 1.0, 1.0, high])  # the interval of 6 values is their whole range
    lines = remark("a / b", found, "x")
    if is_narrow:
        assert lines == []
        return
    shown = f"a / b: 1 x ({low:.4g} to {high:.4g}) over 6 pairs"
    assert lines == [f"{shown}: the spread is too large to quote this figure; run again on an idle machine"]
    assert found.as_json()["verdict"] == found.verdict() == lines[0].removeprefix(f"{shown}: ")


def test_a_small_difference_is_judged_relative_to_the_whole():
    found = estimate([-0.01, 0.0, 0.01, 0.02, 0.03, 0.04])
    assert found.verdict(scale=1.0) is None
    assert "spread" in str(found.verdict(scale=0.1))


def test_fewer_than_6_pairs_give_a_median_without_an_interval():
    found = estimate([1.0, 1.0, 1.0, 1.0, 1.0])
    assert (found.median, found.interval) == (1.0, None)
    assert remark("a / b", found, "x") == ["a / b: 1 x over 5 pairs: too few for an interval, which needs 6"]


def test_threads_of_peers_on_the_cpu_do_not_spin_unless_the_user_says_so(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert peer_environment(gpu=False)["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_WAIT_POLICY" not in peer_environment(gpu=True)
    assert [peer_environment(gpu)["CUDA_VISIBLE_DEVICES"] for gpu in (False, True)] == ["", "3"]
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert peer_environment(gpu=False)["OMP_WAIT_POLICY"] == "active"


def burn(seconds: float) -> None:
    """Use `seconds` of CPU time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_turn_reports_the_wall_time_and_cpu_time_of_its_own_steps(monkeypatch, capfd):
    orders = [{"batch": 8, "steps": 1}, {"batch": 8, "steps": 3}, {"batch": 16, "steps": 1}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(order) + "\n" for order in orders)))
    loop, leading = worker_pipe.Gate(), 2 if torch.cuda.is_available() else 0
    loop.wait()
    for _ in range(leading + 1):
        loop()
        burn(0.03)
    for _ in range(leading + 3):
        loop()
        time.sleep(0.02)
    with pytest.raises(worker_pipe.NewBatch):
        loop()
    first, second = (json.loads(line.removeprefix("REPORT ")) for line in capfd.readouterr().out.splitlines())
    assert first["cpu_seconds"] >= 0.03
    assert second["cpu_seconds"] < second["seconds"]
    assert second["seconds"] >= 3 * 0.02


def _burn_and_report(done: Connection) -> None:
    burn(0.1)
    done.send(None)
    done.recv()


def test_cpu_time_includes_that_of_loader_processes():
    here, there = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_burn_and_report, args=(there,))
    worker.start()
    try:
        here.recv()
        before = time.process_time()
        assert worker_pipe._cpu_seconds() - before >= 0.08  # the kernel counts in ticks of 10 ms
    finally:
        here.send(None)
        worker.join()
