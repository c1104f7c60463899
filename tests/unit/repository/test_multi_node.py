"""launch/multi_node: what it starts, how it ends. A stand-in is in the place of ssh, and one in that of training."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from repository import ROOT

from cloze.config.parser import parse
from cloze.distributed.launch_check import Launched, read_launcher
from cloze.distributed.secret import secret_port
from cloze.tools.launch.launcher import exit_code

RECIPE = "launch/recipes/distilroberta-eli5.yaml"
# Takes the place of `python -m cloze.tools.launch.launcher`: notes its words, and does what the file `act-RANK` says.
LAUNCHER = """#!/bin/bash
for ((i = 1; i <= $#; i++)); do [[ ${!i} == --machine_rank ]] && next=$((i + 1)); done
rank=${!next}
printf '%s\\n' "$@" >words-$rank
bash act-$rank $rank
"""
# One rank below that launcher: it notes signals, and ends at the second one, or after the first with code 75 (130).
RANK = """trap 'echo TERM >>heard-$1; exit 75' TERM
trap 'echo INT >>heard-$1; exit 130' INT
touch up-$1
while :; do sleep 0.05; done
"""
# Takes the place of ssh, which ends with 255 where it cannot reach a host, or reaches it no more.
FAR = """#!/bin/sh
host=$1
shift
[ "$host" != nowhere ] || exit 255
env -i PATH="$PATH" sh -c "$*"
code=$?
[ "$host" != lost ] || exit 255
exit $code
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with the script, whose hosts are this machine."""
    folder = tmp_path / "it's here"
    for name in ("launch", "ds_configs", ".venv/bin"):
        (folder / name).mkdir(parents=True)
    script = (ROOT / "launch/multi_node").read_text()
    assert "notice_seconds=5 " in script
    (folder / "launch/multi_node").write_text(script.replace("notice_seconds=5 ", "notice_seconds=1 "))
    (folder / "ds_configs/zero2.json").write_text("{}")
    (folder / ".venv/bin/python").write_text(LAUNCHER)
    (folder / "far").write_text(FAR)
    for name in ("launch/multi_node", ".venv/bin/python", "far"):
        (folder / name).chmod(0o755)
    yield folder
    for process in Path("/proc").glob("[0-9]*"):  # what a test that failed has left
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == folder:
                os.kill(int(process.name), signal.SIGKILL)


def start(place: Path, *words: str, hosts: str = "a,b") -> subprocess.Popen[str]:
    command = [str(place / "launch/multi_node"), "--hosts", hosts, "--ssh", "./far", *words]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, text=True, start_new_session=True, preexec_fn=heed_interrupts, **out)


def heed_interrupts() -> None:
    """Tests that run in the background of a shell are deaf to SIGINT, and a script of theirs cannot change that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(place: Path, *words: str, hosts: str = "a,b") -> tuple[int, str]:
    process = start(place, *words, hosts=hosts)
    try:
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, output


def act(place: Path, *scripts: str) -> None:
    for rank, script in enumerate(scripts):
        (place / f"act-{rank}").write_text(script + "\n")


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", ROOT / "launch/multi_node"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_each_machine_gets_a_launch_command_that_accelerate_and_cloze_read():
    script = [str(ROOT / "launch/multi_node"), "--dry_run", "--hosts", "first,second,third", "--port=29511"]
    for rank in (0, 2):
        words = [*script, "--rank", str(rank), "--processes_per_node", "4", "--", RECIPE, "--run_name", "it's $HOME"]
        shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        command = shlex.split(shown)
        assert command[:3] == ["python", "-m", "cloze.tools.launch.launcher"]
        launched = launch_command_parser().parse_args(command[3:])
        assert (launched.machine_rank, launched.num_machines, launched.num_processes) == (rank, 3, 12)
        assert (launched.main_process_ip, launched.main_process_port) == ("first", 29511)
        assert launched.config_file == "launch/accelerate/multi_node.yaml"
        assert launched.deepspeed_config_file == "ds_configs/zero2.json"
        name, config = parse(launched.training_script_args)
        assert (name, launched.training_script) == ("train", "cloze")
        assert (config.run_name, config.resume_from_checkpoint) == ("it's $HOME", "auto")


def test_over_ssh_every_host_gets_the_same_secret_and_port_and_no_command_line_shows_the_secret(place: Path):
    note = 'printf "%s" "$CLOZE_SECRET" >secret-$1; cat /proc/[0-9]*/cmdline 2>/dev/null | tr "\\0" "\\n" >lines-$1'
    act(place, f"{note}; exit 0", f"{note}; exit 0")
    seen = set()
    for _ in range(2):
        code, output = run(place, "--", "R.yaml")
        assert code == 0, output
        words = [(place / f"words-{rank}").read_text().splitlines() for rank in range(2)]
        ports = {one[one.index("--main_process_port") + 1] for one in words}
        secrets = {(place / f"secret-{rank}").read_text() for rank in range(2)}
        assert (len(ports), len(secrets)) == (1, 1), "both hosts have the same"
        port, secret = ports.pop(), secrets.pop()
        assert re.fullmatch("[0-9a-f]{64}", secret)
        assert 20000 <= int(port) < 32768
        assert all(secret not in (place / f"lines-{rank}").read_text() for rank in range(2))
        assert "multi_node" in (place / "lines-0").read_text()
        seen.add((port, secret))
    assert len(seen) == 2, "another one for each start"


def test_over_ssh_every_host_runs_its_own_rank_with_the_words_as_they_were_given(place: Path):
    act(place, "exit 0", "exit 0")
    awkward = ["--run_name", "it's $HOME; *", "--optim_args", ""]
    os.environ["NCCL_SOCKET_IFNAME"] = "eth 7"
    try:
        (place / "act-1").write_text('echo "interface $NCCL_SOCKET_IFNAME"\n')
        code, output = run(place, "--processes_per_node", "2", "--", "R.yaml", *awkward)
    finally:
        del os.environ["NCCL_SOCKET_IFNAME"]
    assert code == 0, output
    for rank in range(2):
        words = (place / f"words-{rank}").read_text().split("\n")[:-1]
        assert words[words.index("--machine_rank") + 1] == str(rank)
        assert words[words.index("--num_processes") + 1] == "4"
        assert words[words.index("cloze") :] == [
            *("cloze", "train", "--resume_from_checkpoint", "auto", "--config", "R.yaml"),
            *awkward,
        ]
    assert "b | interface eth 7\n" in output
    assert "interface eth 7" in (place / "logs/b.log").read_text()
    assert "interface" not in (place / "logs/a.log").read_text()


@pytest.mark.parametrize(
    ("codes", "whole"),
    [((0, 0), 0), ((0, 75), 75), ((75, 2), 2), ((2, 1), 2), ((75, 1), 1), ((75, 130), 130), ((137, 75), 75)],
    ids=str,
)
def test_the_exit_code_is_that_of_the_machine_that_matters_most(place: Path, codes: tuple[int, int], whole: int):
    act(place, *(f"exit {code}" for code in codes))
    assert run(place, "--", "R.yaml")[0] == whole


def test_when_one_ends_badly_the_others_are_ended(place: Path):
    (place / "rank").write_text(RANK)
    act(place, "exec bash rank 0", "sleep 0.3; exit 1")
    code, output = run(place, "--", "R.yaml")
    assert (code, (place / "heard-0").read_text()) == (1, "TERM\n"), output


def test_a_machine_that_does_not_end_is_ended_by_force(place: Path):
    act(place, "trap '' TERM; exec sleep 1000", "exit 1")
    code, output = run(place, "--kill_after", "1", "--", "R.yaml")
    assert code == 1
    assert "left alone" not in output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=lambda n: str(n))
def test_a_signal_reaches_the_ranks_of_all_machines_once(place: Path, number: int, code: int):
    (place / "rank").write_text(RANK)
    act(place, "exec bash rank 0", "exec bash rank 1")
    process = start(place, "--", "R.yaml")
    wait_for(place / "up-0", place / "up-1")
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code, output
    name = signal.Signals(number).name.removeprefix("SIG")
    assert [(place / f"heard-{rank}").read_text() for rank in range(2)] == [f"{name}\n"] * 2


def test_one_machine_started_by_hand_passes_a_signal_on_to_its_ranks(place: Path):
    (place / "rank").write_text(RANK)
    act(place, "", "exec bash rank 1")
    process = start(place, "--rank", "1", "--", "R.yaml")
    wait_for(place / "up-1")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert (place / "heard-1").read_text() == "TERM\n"


def test_machines_started_by_hand_agree_on_a_port_that_follows_from_their_secret(place: Path):
    words = ["launch/multi_node", "--hosts", "a,b", "--rank", "1", "--dry_run", "--", RECIPE]
    ports = []
    for secret in ("", "0123456789abcdef"):
        environment = {**os.environ, "CLOZE_SECRET": secret}
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=True)
        ports.append(done.stdout.split("--main_process_port ")[1].split()[0])
    assert ports == ["29500", str(secret_port("0123456789abcdef", "multi_node"))]


def test_the_ranks_are_asked_to_stop_when_the_place_that_started_them_is_gone(place: Path):
    """Each of them, also when another one does not end."""
    (place / "rank").write_text(RANK)
    act(place, "exec bash rank 0", "exec bash rank 1", "trap '' TERM; touch up-2; exec sleep 1000")
    process = start(place, "--", "R.yaml", hosts="a,b,c")
    wait_for(*(place / f"up-{rank}" for rank in range(3)))
    process.kill()
    wait_for(place / "heard-0", place / "heard-1")


def test_a_run_that_lost_a_machine_is_started_again_so_often(place: Path):
    act(place, "echo >>tries; [[ $(wc -l <tries) == 3 ]] || exit 75", "exit 0")
    code, output = run(place, "--max_restarts", "1", "--", "R.yaml")
    assert (code, (place / "tries").read_text().count("\n")) == (75, 2)
    assert "starting again, 1 of 1" in output
    assert run(place, "--max_restarts", "1", "--", "R.yaml")[0] == 0


def test_something_to_mend_and_a_request_to_stop_start_nothing_again(place: Path):
    act(place, "echo >>tries; exit 2", "exit 0")
    assert run(place, "--max_restarts", "3", "--", "R.yaml")[0] == 2
    assert (place / "tries").read_text() == "\n"
    (place / "rank").write_text(RANK)
    act(place, "exec bash rank 0", "exec bash rank 1")
    process = start(place, "--max_restarts", "3", "--", "R.yaml")
    wait_for(place / "up-0", place / "up-1")
    process.send_signal(signal.SIGTERM)
    assert "starting again" not in process.communicate(timeout=20)[0]
    assert process.returncode == 75


def test_a_host_that_cannot_be_reached_is_something_to_mend_and_a_lost_one_is_not(place: Path):
    act(place, "exit 0", "")
    code, output = run(place, "--", "R.yaml", hosts="a,nowhere")
    assert code == 2
    assert "multi_node: error: cannot reach nowhere\n" in output
    act(place, "exit 0", "exit 0")
    code, output = run(place, "--", "R.yaml", hosts="a,lost")
    assert code == 75
    assert "multi_node: error: lost lost\n" in output


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--", RECIPE], "no --hosts"),
        (["--hosts", "a,b"], "no recipe; put it after --"),
        (["--hosts", "a,b", RECIPE], "after --"),
        (["--hosts", "a,b", "--rank", "2", "--", RECIPE], "--rank 2, but there are 2 hosts, counted from 0"),
        (["--hosts", "a,b", "--rank", "x", "--", RECIPE], "--rank must be a number, not x"),
        (["--hosts", "a,b", "--max_steps", "3", "--", RECIPE], "unknown option --max_steps"),
        (["--hosts", "a,b", "--ds_config", "none.json", "--", RECIPE], "no none.json in"),
        (["--hosts"], "--hosts needs a value"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_option_is_one_line(words: list[str], line: str):
    done = subprocess.run([ROOT / "launch/multi_node", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("multi_node: error: ")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_tells_every_option():
    script = ROOT / "launch/multi_node"
    told = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    assert told.startswith("Train on several machines without SLURM")
    options = {word.split(")")[0].split(" ")[0].strip() for word in script.read_text().split("\n            ")}
    options = {word for word in options if word.startswith("--") and word not in ("--", "--help", "--obey_stdin")}
    assert {"--hosts", "--dry_run", "--kill_after"} <= options
    assert all(f"  {option} " in told for option in options)


@pytest.mark.parametrize(
    ("codes", "whole"),
    [([0], 0), ([75, 75], 75), ([-9, 75], 75), ([-9], 75), ([2, 75], 2), ([1, 2], 2), ([1, -15], 1), ([130, 75], 130)],
    ids=str,
)
def test_the_launchers_exit_code_tells_what_its_ranks_ended_with(codes: list[int], whole: int):
    assert exit_code(codes) == whole


def test_what_was_launched_is_read_from_the_launchers_command_line(monkeypatch: pytest.MonkeyPatch):
    words = [
        "python",
        "-m",
        "cloze.tools.launch.launcher",
        "--config_file",
        str(ROOT / "launch/accelerate/multi_node.yaml"),
    ]
    monkeypatch.setattr(
        "cloze.distributed.launch_check._ancestors", lambda: [["bash"], [*words, "--num_processes", "12", "a.py"]]
    )
    assert read_launcher() == Launched(num_processes=12, num_machines=2, deepspeed=True)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", ["1", "2"])
@pytest.mark.parametrize("code", [2, 75])
def test_the_launcher_passes_on_the_code_of_a_real_rank_without_a_traceback(
    tmp_path: Path, code: int, num_processes: str
):
    script = tmp_path / "rank.py"
    script.write_text(f"raise SystemExit({code})\n")
    config = "launch/accelerate/cpu.yaml" if num_processes == "2" else tmp_path / "one.yaml"
    (tmp_path / "one.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\n")
    words = [
        "-m",
        "cloze.tools.launch.launcher",
        "--config_file",
        str(config),
        "--num_processes",
        num_processes,
        str(script),
    ]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
