"""Signals to the launcher, and its death: the ranks save one checkpoint, and the next start goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from ranks import wait_for
from repository import ROOT

from cloze.checkpoint.format import list_checkpoints, verify_checkpoint

FLAGS = [*TINY_MODEL, "--logging_steps", "1", "--save_steps", "100000", "--learning_rate", "1e-3"]


def words(prepared: Path, run: Path, config: str, steps: int, *launcher: str) -> list[str]:
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{config}.yaml"]
    start += ["--main_process_port", "0", *launcher, "-m", "cloze", "train", *FLAGS, "--max_steps", str(steps)]
    return [*start, "--dataset_name", str(prepared), "--output_dir", str(run), "--resume_from_checkpoint", "auto"]


def ranks_of(launcher: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def steps_done(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize(
    "number",
    [
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)),
        signal.SIGINT,
    ],
    ids=lambda n: n.name,
)
def test_the_launcher_gets_a_signal(prepared: Path, tmp_path: Path, number: int):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    config = "zero2" if number in (signal.SIGTERM, signal.SIGKILL) else "cpu"
    with open(log, "w") as out:
        process = subprocess.Popen(
            words(prepared, run, config, 100000), cwd=ROOT, stdout=out, stderr=out, start_new_session=True
        )
    wait_for(lambda: steps_done(run) >= 3)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal's Ctrl-C goes to all processes
    else:
        process.send_signal(number)
    assert process.wait(timeout=60) != 0
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
    found = list_checkpoints(run)
    assert len(found) == 1
    manifest = verify_checkpoint(found[0])
    assert f"stopped after step {manifest['position']['global_step']}; {found[0].name} is saved" in log.read_text()


def test_a_killed_rank_is_started_again_by_the_launcher(prepared: Path, tmp_path: Path):
    """`--max_restarts`: the launcher starts all ranks anew, and they go on from the last checkpoint."""
    run, log = tmp_path / "run", tmp_path / "log.txt"
    argv = words(prepared, run, "cpu", 40, "--max_restarts", "2", "--rdzv_backend", "c10d")
    argv[argv.index("--save_steps") + 1] = "5"
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else gloo meets keys of the first start
    with open(log, "w") as out:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=out, stderr=out, env=environment)
    wait_for(lambda: steps_done(run) >= 7)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    assert process.wait(timeout=120) == 0, log.read_text()
    assert "died in" in log.read_text()
    assert "resume       from" in log.read_text()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))


RANK = """
import os, signal, sys, time
def stop(number, frame):
    global told
    told = number
told = 0
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, stop)
open(f"{sys.argv[1]}/ready-{os.environ.get('RANK', 0)}", "w").close()
while not told:
    time.sleep(0.02)
time.sleep(float(sys.argv[2]))
open(f"{sys.argv[1]}/saved-{os.environ.get('RANK', 0)}", "w").write(signal.Signals(told).name)
sys.exit(75)
"""


@pytest.mark.parametrize(
    ("number", "seconds", "num_processes"),
    [
        (signal.SIGTERM, 1, 2),
        (signal.SIGTERM, 1, 1),
        *(
            pytest.param(number, seconds, num_processes, marks=pytest.mark.slow)
            for number, seconds, num_processes in [
                (signal.SIGUSR1, 1, 2),
                (signal.SIGINT, 1, 2),
                (signal.SIGUSR1, 1, 1),
                (signal.SIGINT, 1, 1),
                (signal.SIGTERM, 40, 2),
            ]
        ),
    ],
)
def test_our_launcher_lets_the_ranks_save_however_long_it_takes(
    tmp_path: Path, number: int, seconds: int, num_processes: int
):
    """The ranks stand in for training that saves a large checkpoint: torch's launcher would kill them after 30 s, and
    accelerate starts a single one without torch's."""
    (tmp_path / "rank.py").write_text(RANK)
    launch = [sys.executable, "-m", "cloze.tools.launch.launcher", "--num_processes", str(num_processes)]
    if num_processes == 2:
        launch += ["--config_file", "launch/accelerate/zero2.yaml"]
    else:
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
    words = [*launch, str(tmp_path / "rank.py"), str(tmp_path), str(seconds)]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == num_processes)
    os.killpg(process.pid, number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    saved = [(tmp_path / f"saved-{rank}").read_text() for rank in range(num_processes)]
    assert saved == [signal.Signals(number).name] * num_processes
    assert "Traceback" not in told


@pytest.mark.slow
def test_a_port_that_is_taken_on_the_first_of_two_machines_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = ["--config_file", "launch/accelerate/cpu.yaml", "--num_machines", "2", "--machine_rank", "0"]
        flags += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        start = [sys.executable, "-m", "cloze.tools.launch.launcher", *flags, "-m", "cloze", "train"]
        done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert f"port `{port}`" in done.stderr.splitlines()[-1]
