"""`cloze train --push_to_hub`: what goes up while training, and that nothing there can stop or spoil the run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from corpus import TINY_MODEL_NO_DROPOUT
from local_hub import Fault, LocalHub
from pushing import HOST, READ, RUN_FLAGS, WRITE, Client, everything
from safetensors.torch import load
from transformers import AutoModelForMaskedLM

from cloze.checkpoint.format import read_manifest, verify_checkpoint
from cloze.checkpoint.run_folder import read_metrics
from cloze.training.logging.sessions import read_sessions

MODEL = {"README.md", "config.json", "loss.svg", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def until(what: Callable[[], object], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def flags(prepared: Path, run: Path, *more: str) -> list[str]:
    return ["--dataset_name", str(prepared), "--output_dir", str(run), *RUN_FLAGS, *TINY_MODEL_NO_DROPOUT, *more]


def environment(hub: LocalHub, tmp_path: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return (
        env
        | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        | {
            "OMP_NUM_THREADS": "1"  # as in the run that this one is compared with
        }
    )


class Follow:
    """The process that pushes, without training: checkpoints are put into a run's folder one by one."""

    def __init__(self, hub: LocalHub, trained: Path, tmp_path: Path, strategy: str):
        self.hub, self.trained, self.run = hub, trained, tmp_path / "runs" / HOST / "six"
        self.run.mkdir(parents=True)
        for name in ("config.yaml", "data.json", "metrics.jsonl", "sessions.json", "run.json"):
            shutil.copy(trained / name, self.run)
        words = [sys.executable, "-m", "cloze.export.hub.pusher"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(words, env=environment(hub, tmp_path), text=True, **pipes)
        self.say(json.dumps({"run_dir": str(self.run), "repo": "user/six", "strategy": strategy, "token": WRITE}))

    def say(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def put(self, step: int) -> None:
        """A whole checkpoint appears, as training lets it appear."""
        name = f"checkpoint-{step}"
        os.rename(shutil.copytree(self.trained / name, self.run / f"{name}.tmp"), self.run / name)

    def take(self, step: int) -> None:
        shutil.rmtree(self.run / f"checkpoint-{step}")

    def commits(self) -> int:
        repo = self.hub.repos.get("user/six")
        return len(repo.commits) - 1 if repo else 0

    def end(self) -> dict[str, str]:
        self.say("end")
        told = [json.loads(line) for line in self.process.stdout]
        assert self.process.wait(60) == 0
        return told[-1]["end"]


@pytest.fixture
def follow(hub: LocalHub, trained: Path, tmp_path: Path) -> Iterator[Callable[[str], Follow]]:
    started: list[Follow] = []

    def begin(strategy: str) -> Follow:
        started.append(Follow(hub, trained, tmp_path, strategy))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.communicate()


def weights(run: Path, step: int, tmp_path: Path) -> dict[str, torch.Tensor]:
    from cloze.export.consolidation.model_folder import consolidate

    consolidate(run / f"checkpoint-{step}", tmp_path / f"model-{step}", 10**9)
    return dict(AutoModelForMaskedLM.from_pretrained(tmp_path / f"model-{step}").state_dict())


def test_each_save_brings_the_model_and_the_last_checkpoint_in_one_commit(hub: LocalHub, follow, trained, tmp_path):
    followed = follow("checkpoint")
    followed.put(2)
    until(lambda: followed.commits() == 1)
    first = hub.files("user/six")
    assert {name for name in first if "/" not in name} == MODEL
    followed.put(4)
    followed.take(2)
    until(lambda: followed.commits() == 2)
    url = followed.end()["url"]
    assert url.endswith(hub.repos["user/six"].sha("main"))
    assert followed.commits() == 2
    files = hub.files("user/six")
    there = weights(trained, 4, tmp_path)
    assert all(torch.equal(tensor, there[name]) for name, tensor in load(files["model.safetensors"]).items())
    assert first["model.safetensors"] != files["model.safetensors"]
    for name, content in files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    assert verify_checkpoint(tmp_path / "pulled" / "last-checkpoint")["position"]["global_step"] == 4
    assert not (followed.run / "push.tmp").exists()


def test_all_checkpoints_go_up_also_late_ones_and_with_them_no_secret_path_or_host_name(
    hub: LocalHub, follow, trained: Path, prepared: Path
):
    followed = follow("all_checkpoints")
    come = threading.Event()
    hub.faults = [Fault("POST", "/commit/main", call=lambda: come.wait(60))]
    followed.put(2)
    until(lambda: hub.requests("POST", "/commit/main"))
    followed.put(4)
    followed.put(6)
    come.set()
    followed.end()
    files = hub.files("user/six")
    assert {name.split("/")[0] for name in files if "/" in name} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert followed.commits() == 2
    sent = b"".join(hub.received) + everything(files)
    assert b'"global_step": 6' in sent
    places = (str(trained.parent), str(prepared.parent), str(followed.run.parent), f"{Path.home()}/")
    assert all(place in (trained / "checkpoint-6" / "checkpoint.json").read_text() for place in places[:2])
    for secret in (WRITE, HOST, *places):
        assert secret.encode() not in sent


@pytest.mark.slow
def test_at_the_end_only_the_last_model_is_pushed(hub: LocalHub, follow):
    followed = follow("end")
    followed.put(2)
    followed.put(4)
    time.sleep(1.5)
    assert hub.log == []
    followed.end()
    assert followed.commits() == 1
    assert set(hub.files("user/six")) == MODEL
    assert "| steps | 4 |" in hub.files("user/six")["README.md"].decode()


def test_a_push_that_fails_is_one_warning_and_the_next_one_has_all(hub: LocalHub, follow):
    followed = follow("every_save")
    hub.faults = [Fault("POST", "/preupload/main", 403)]
    followed.put(2)
    until(lambda: hub.faults[0].times == 0)
    followed.put(4)
    until(lambda: followed.commits() == 1)
    assert "url" in followed.end()
    told = followed.process.stderr.read().splitlines()
    assert [line for line in told if line.startswith("cloze: warning")] == told
    assert len(told) == 1
    assert "checkpoint-2 was not pushed: user/six: the token may not write here (403)" in told[0]


def test_without_training_there_is_nobody_to_push_for(hub: LocalHub, follow):
    followed = follow("every_save")
    followed.process.stdin.close()
    assert followed.process.wait(30) == 1
    followed.process.stdin = None


@contextlib.contextmanager
def training(hub: LocalHub, prepared: Path, run: Path, tmp_path: Path, *more: str):
    words = [sys.executable, "-m", "cloze", "train", *flags(prepared, run, "--push_to_hub", *more)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = environment(hub, tmp_path)
    process = subprocess.Popen(words, env=env, text=True, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_run_that_pushes_is_the_same_run_and_goes_on_from_what_is_pulled(
    hub: LocalHub, client: Client, trained: Path, prepared: Path, tmp_path: Path
):
    run = tmp_path / "runs" / "mine"
    secret = ["--hub_token", WRITE, "--token", WRITE, "--hub_strategy", "checkpoint", "--hub_private_repo", "true"]
    with training(hub, prepared, run, tmp_path, *secret) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    commit = hub.repos["user/mine"].sha("main")
    assert f"push         {hub.url}/user/mine/commit/{commit}" in out.splitlines()
    assert hub.repos["user/mine"].private
    (session,) = read_sessions(run)
    assert (session["first_step"], session["ranks"], session["hosts"]) == (0, 1, 1)
    losses = [line["loss"] for line in read_metrics(trained)]
    assert [line["loss"] for line in read_metrics(run)] == losses
    for path in run.rglob("*"):
        assert path.is_dir() or WRITE.encode() not in path.read_bytes()
    assert "hub_token" not in yaml.safe_load((run / "config.yaml").read_text())
    files = hub.files("user/mine")
    assert WRITE.encode() not in everything(files)

    pulled = tmp_path / "pulled" / "last-checkpoint"
    for name, content in files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    assert read_manifest(pulled)["position"]["global_step"] == 6
    further = flags(prepared, tmp_path / "further", "--resume_from_checkpoint", str(pulled))
    done = client("-m", "cloze", "train", *further, token=None)
    assert done.returncode == 0, done.stderr
    assert f"from {pulled} at step 6" in done.stdout
    assert [one["first_step"] for one in read_sessions(tmp_path / "further")] == [6]


def test_a_failure_at_the_end_leaves_the_run_good_and_says_how_to_push_by_hand(
    hub: LocalHub, prepared: Path, tmp_path: Path
):
    hub.faults = [Fault("POST", "/commit/main", 403, times=99)]
    run = tmp_path / "runs" / "mine"
    with training(hub, prepared, run, tmp_path, "--hub_token", WRITE, "--hub_strategy", "end") as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    (line,) = [line for line in err.splitlines() if "not pushed" in line]
    assert "the token may not write here (403)" in line
    assert f"cloze consolidate {run} && cloze push {run} --repo user/mine" in line
    assert hub.files("user/mine") == {}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_an_end_in_the_middle_of_a_push_leaves_the_repository_whole(
    hub: LocalHub, prepared: Path, tmp_path: Path, number: signal.Signals
):
    run, leave = tmp_path / "runs" / "mine", threading.Event()
    hub.faults = [Fault("POST", "/objects/batch", call=lambda: leave.wait(60))]
    with training(hub, prepared, run, tmp_path, "--hub_token", WRITE, "--hub_strategy", "end") as process:
        until(lambda: hub.requests("POST", "/objects/batch"))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    if number == signal.SIGINT:
        assert err.splitlines()[-1].startswith("cloze: interrupted while pushing; training is done, push by hand: ")
    assert children
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 10)
    leave.set()
    assert hub.files("user/mine") == {}
    assert (run / "checkpoint-6" / "checkpoint.json").is_file()


CHECK = """
import sys
from cloze.config import TrainConfig
from cloze.errors import ClozeError
from cloze.export.hub.follow import following
for more in {"hub_token": sys.argv[1]}, {"hub_model_id": "somebody/x"}, {"save_strategy": "no"}:
    try:
        with following(TrainConfig(output_dir="runs/mine", push_to_hub=True, **more)):
            raise SystemExit("training began")
    except ClozeError as error:
        print(error)
"""


def test_what_cannot_be_pushed_is_said_before_training_begins(hub: LocalHub, client: Client):
    done = client("-c", CHECK, READ, token=WRITE)
    assert done.returncode == 0, done.stderr
    read_only, nobody, save = done.stdout.splitlines()
    assert "user/mine" not in hub.repos
    assert "lacks the scope `write`" in read_only
    assert "may not write there" in nobody
    assert "set another --save_strategy" in save
