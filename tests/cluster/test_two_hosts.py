"""Training on two hosts, each with a network of its own: the same run, and what happens to it when a cable is bad."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from corpus import TINY_MODEL_NO_DROPOUT
from hosts import Host, Hosts, wait_for, why_not
from ranks import at_call, cloze_ranks, succeed
from repository import ROOT

STEPS = 10
FLAGS = [*TINY_MODEL_NO_DROPOUT, "--max_steps", str(STEPS), "--logging_steps", "1", "--learning_rate", "1e-3"]

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(["a", "b"], tmp_path) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def reference(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The curve of one process on one machine, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("reference")
    succeed(cloze_ranks(["train", *flags(prepared, folder / "run", 8)], 1, "single", folder))
    return curve(folder / "run")


def flags(prepared: Path, run: Path, per_device: int, *more: str) -> list[str]:
    where = ["--dataset_name", str(prepared), "--output_dir", str(run)]
    return [*FLAGS, *where, "--per_device_train_batch_size", str(per_device), "--save_strategy", "no", *more]


def curve(run: Path) -> np.ndarray:
    """[steps, 2]: loss and gradient norm."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return np.array([(line["loss"], line["grad_norm"]) for line in lines])


def assert_same_curve(one: np.ndarray, other: np.ndarray) -> None:
    assert np.abs(one / other - 1).max() < 1e-5


def launch(hosts: Hosts, words: list[str], *options: str) -> tuple[list[str], dict[str, str]]:
    """`launch/multi_node` from outside, over what is ssh here: its words and its environment."""
    remote = ["--ssh", hosts.remote_shell(), "--hosts", "a,b"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return [str(ROOT / "launch/multi_node"), *remote, *options, "--", *words], environment


def on(hosts: Hosts, before: Callable[[], None] | None = None) -> Callable[[], None]:
    """To be called in a rank: the first one moves to host a, the second to b."""

    def install() -> None:
        rank = int(os.environ["RANK"])
        hosts["ab"[rank]].move_in()
        os.environ |= {"MASTER_ADDR": hosts["a"].address, "LOCAL_RANK": "0"}
        if before is not None:
            before()

    return install


def test_two_hosts_train_the_same_run_as_one_machine(hosts: Hosts, prepared: Path, tmp_path: Path, reference):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset_name: {prepared}\noutput_dir: {tmp_path / 'run'}\nlogging_steps: 1\n")
    words, environment = launch(
        hosts,
        [str(recipe), *FLAGS, "--save_strategy", "no", "--per_device_train_batch_size", "4"],
        *("--processes_per_node", "1", "--log_dir", str(tmp_path / "logs")),
    )
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CLOZE_SECRET" not in done.stdout + done.stderr, "the hosts share a secret"
    assert re.search(r"^a \| world +2 ranks on 2 hosts, DeepSpeed ZeRO-2, fp32, cpu, gloo$", done.stdout, re.M)
    assert f"started on b in {ROOT}, rank 1 of 2 machines" in (tmp_path / "logs/b.log").read_text()
    assert_same_curve(curve(tmp_path / "run"), reference)


@pytest.mark.slow
def test_two_hosts_with_two_processes_each_started_by_hand(hosts: Hosts, prepared: Path, tmp_path: Path, reference):
    words = ["--hosts", "a,b", "--processes_per_node", "2", "--", *flags(prepared, tmp_path / "run", 2)]
    environment = launch(hosts, [])[1]
    processes = [
        host.start(["launch/multi_node", "--rank", str(rank), *words], env=environment, stdout=subprocess.PIPE)
        for rank, host in enumerate(hosts)
    ]
    output = "".join(process.communicate(timeout=200)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert "4 ranks on 2 hosts, DeepSpeed ZeRO-2" in output
    assert_same_curve(curve(tmp_path / "run"), reference)


def cut_after_a_while(host: Host) -> Callable[[], None]:
    def act() -> None:
        time.sleep(1.5)  # so that the others know its step
        host.cut()

    return act


@pytest.mark.parametrize("engine", ["zero2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_cable_that_is_cut_in_a_step_is_named_on_both_sides(hosts, prepared, tmp_path, engine):
    """No packet tells of it, so that only time-outs can; the code says: start again."""
    cut = at_call("cloze.training.trainer", "masked_loss_sum", 4, cut_after_a_while(hosts["b"]))
    argv = ["train", *flags(prepared, tmp_path / "run", 4, "--ddp_timeout", "8")]
    begin = time.monotonic()
    outcomes = cloze_ranks(argv, 2, engine, tmp_path / "log", on(hosts, cut), timeout=60)
    assert time.monotonic() - begin < 40, "30 s after the cut at the latest"
    assert [outcome.code for outcome in outcomes] == [75, 75]
    for outcome, other in zip(outcomes, ("rank 1 on b", "rank 0 on a"), strict=True):
        told = [
            line for line in outcome.output.splitlines() if re.match(r"(\[rank \d @ [ab]\] )?cloze: error: ", line)
        ]
        assert len(told) == 1, outcome.output
        assert f"{other} said nothing for 8 s in train, step 3; --resume_from_checkpoint auto resumes" in told[0]
        assert "Traceback" not in outcome.output


@pytest.mark.slow
def test_a_long_and_bad_cable_makes_training_slower_and_nothing_else(hosts, prepared, tmp_path, reference):
    """10 ms each way, and every hundredth frame lost."""
    hosts["b"].lengthen(delay=0.01, loss=0.01)
    argv = ["train", *flags(prepared, tmp_path / "run", 4)]
    succeed(cloze_ranks(argv, 2, "zero2", tmp_path / "log", on(hosts)))
    assert_same_curve(curve(tmp_path / "run"), reference)


@pytest.mark.slow
def test_a_cable_that_is_put_back_in_time_ends_nothing(hosts: Hosts, prepared: Path, tmp_path: Path, reference):
    def out_and_in() -> None:
        hosts["b"].cut()
        time.sleep(3)
        hosts["b"].mend()

    before = on(hosts, at_call("cloze.training.trainer", "masked_loss_sum", 4, out_and_in))
    argv = ["train", *flags(prepared, tmp_path / "run", 4, "--ddp_timeout", "20")]
    succeed(cloze_ranks(argv, 2, "zero2", tmp_path / "log", before))
    assert_same_curve(curve(tmp_path / "run"), reference)


@pytest.mark.slow
def test_a_cut_cable_is_named_by_both_hosts_and_the_next_start_goes_on(hosts, prepared, tmp_path, reference):
    """Two processes on each host, all of it through launch/multi_node, with a checkpoint before the cut."""
    run, log = tmp_path / "run", tmp_path / "log.txt"
    argv = flags(prepared, run, 2, "--ddp_timeout", "8", "--save_strategy", "steps", "--save_steps", "2")
    hosts["b"].lengthen(delay=0.005)  # so that there is time to cut it
    options = ["--processes_per_node", "2", "--max_restarts", "1", "--log_dir", str(tmp_path / "logs")]
    words, environment = launch(hosts, argv, *options)
    with open(log, "w") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=out)
        wait_for(lambda: (run / "checkpoint-4").is_dir(), 120, "for a checkpoint")
        begin = time.monotonic()
        hosts["b"].cut()
        wait_for(lambda: "starting again, 1 of 1" in log.read_text(), 60, "for the end")
        assert time.monotonic() - begin < 35
        hosts["b"].mend()
        assert process.wait(timeout=120) == 0, log.read_text()
    told = re.findall(
        r"^([ab]) \| (?:\[rank \d @ [ab]\] )?cloze: error: (rank \d on [ab]) said nothing for 8 s",
        log.read_text(),
        re.M,
    )
    assert {host for host, _ in told} == {"a", "b"}
    assert all(other[-1] != host for host, other in told)
    assert re.search(r"resume +from .*checkpoint-\d", log.read_text())
    assert_same_curve(curve(run), reference)


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_on_two_hosts(hosts: Hosts, prepared: Path, tmp_path: Path):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    argv = flags(prepared, run, 4, "--max_steps", "100000", "--save_strategy", "steps", "--save_steps", "100000")
    words, environment = launch(hosts, argv, "--processes_per_node", "1", "--log_dir", str(tmp_path / "logs"))
    with open(log, "w") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=out, start_new_session=True)
        file = run / "metrics.jsonl"
        wait_for(lambda: file.exists() and file.read_text().count("\n") > 3, 120, "for steps")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130, log.read_text()
    assert re.search(r"interrupted: stopped after step (\d+); checkpoint-\1 is saved", log.read_text())
    assert "Traceback" not in log.read_text()
