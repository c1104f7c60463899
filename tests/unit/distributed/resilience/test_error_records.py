"""What failed ranks leave becomes one story: who was first, where and why; told once; without secrets."""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks

from cloze.config import TrainConfig
from cloze.distributed.resilience import report_error as reporting
from cloze.distributed.resilience.error_records import (
    FailureLog,
    forget,
    record_of,
    secret_values,
    summary,
    timestamp,
)
from cloze.distributed.resilience.report_error import format_ranks, report_error
from cloze.errors import ConfigError, DataError, LaunchError, LostRank, TrainingError, error_phase, phase_of
from cloze.training.run_dir import kept_failures, open_run_folder
from cloze.utils.terminal import console


def lost(rank: int, when: float, kind: str = "LostRank", **more: object) -> dict:
    where = {"rank": rank, "host": "far", "phase": "train", "step": 7, "error": f"rank {rank} on far died"}
    return {**where, "kind": kind, "exit_code": 75, "time": timestamp(when)} | more


def record(rank: int, when: float, error: Exception | None = None, phase: str = "train") -> dict:
    try:
        with error_phase(phase, 7):
            raise error or ValueError("no good")
    except Exception as raised:
        return record_of(raised, rank, (), when)


def who(records: list[dict]) -> list[int]:
    """The ranks in the order of error.json, whatever the order in which the records are read."""
    orders = set()
    for shuffled in itertools.islice(itertools.permutations(records), 50):
        said = summary(list(shuffled))
        assert said is not None
        orders.add((said["rank"], *(other["rank"] for other in said["others"])))
    assert len(orders) == 1
    return list(orders.pop())


def test_where_nobody_failed_there_is_nothing_to_say():
    assert summary([]) is None


def test_the_first_in_time_is_named_with_all_that_is_known_of_it():
    said = summary([record(2, 105.0), record(1, 100.25, KeyError("x"), "evaluate"), record(0, 110.0)])
    assert said is not None
    others = said.pop("others")
    assert said == {
        "rank": 1, "host": os.uname().nodename, "phase": "evaluate", "step": 7, "error": "KeyError: 'x'",
        "kind": "KeyError", "exit_code": 1, "time": "1970-01-01T00:01:40.250+00:00",
    }  # fmt: skip
    assert [other["rank"] for other in others] == [2, 0]
    assert all(other.keys() == said.keys() for other in others)


@pytest.mark.parametrize(
    "follow_up",
    [
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:4711"),
        RuntimeError("NCCL communicator was aborted on rank 3"),
        ConnectionResetError(104, "Connection reset by peer"),
        BrokenPipeError(32, "Broken pipe"),
        LaunchError("rank 0 failed: ValueError: no good"),
        LostRank("rank 1 on far failed in train, step 7: ValueError: no good", exit_code=1, lost=lost(1, 100.1)),
        LostRank("another rank ended while the processes were joining"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_what_follows_from_another_ranks_end_comes_after_it_though_its_clock_says_otherwise(follow_up):
    assert who([record(0, 99.0, follow_up), record(1, 100.0), record(2, 99.5, follow_up)]) == [1, 0, 2]


def test_a_rank_that_was_killed_is_named_by_its_neighbours_at_the_time_when_the_first_noticed():
    neighbours = [record(rank, 100.0 + rank, LostRank("...", lost=lost(3, 90.0 + rank))) for rank in (0, 1, 2)]
    said = summary(neighbours)
    assert said is not None
    expected = lost(3, 90.0)
    assert {key: said[key] for key in expected} == expected
    assert who(neighbours) == [3, 0, 1, 2]


def test_a_killed_rank_and_one_that_failed_by_itself_stand_in_the_order_of_time():
    notice = record(0, 101.0, LostRank("...", lost=lost(3, 100.0)))
    assert who([notice, record(1, 99.0)]) == [1, 3, 0]
    assert who([notice, record(1, 100.5)]) == [3, 1, 0]


def test_a_rank_that_speaks_for_itself_is_not_spoken_for():
    notice = record(0, 101.0, LostRank("...", exit_code=1, lost=lost(1, 98.0, "ValueError")))
    assert who([notice, record(1, 100.0)]) == [1, 0]
    # rank 0 is gone after it has said who it missed: it is no cause
    chain = [
        record(0, 101.0, LostRank("...", lost=lost(2, 100.0))),
        record(1, 106.0, LostRank("...", lost=lost(0, 102))),
    ]
    assert who(chain) == [2, 0, 1]


def test_in_a_hang_the_rank_that_waits_for_nobody_is_named_though_all_stopped_together():
    hangs = [
        record(
            rank, 160.0, LostRank("...", lost=lost(rank, 100.0 + rank / 10, follow_up=rank != 2, error="no progress"))
        )
        for rank in range(4)
    ]
    assert who(hangs) == [2, 0, 1, 3]


def test_of_ranks_that_had_the_same_in_one_moment_the_lowest_is_first_since_clocks_differ():
    same = [record(rank, 100.0 - rank / 10, TrainingError("loss is nan")) for rank in range(4)]
    assert who(same) == [0, 3, 2, 1]
    assert who([record(0, 105.0), record(1, 100.0), record(2, 100.3)]) == [1, 2, 0]


def test_no_secret_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdef0123456789")
    secrets = secret_values(SimpleNamespace(token="my-secret-token", hub_token=None))
    error = ValueError("401 for my-secret-token, abcdef0123456789 and hf_ABCDEFGHIJKLMNOPQRSTUVWX")
    kept = json.dumps(record_of(error, 1, secrets, 0.0))
    assert "401 for ***, *** and ***" in kept
    told = LostRank("...", lost=lost(3, 0.0, error="no my-secret-token"))
    assert "my-secret-token" not in json.dumps(record_of(told, 1, secrets, 0.0))


def leave(folder: Path, rank: int, error: Exception, world_size: int = 8) -> FailureLog:
    log = FailureLog(folder, rank, world_size)
    log.leave(error)
    return log


def test_each_rank_makes_error_json_anew_until_all_are_in_it(tmp_path: Path):
    for rank in random.Random(0).sample(range(8), 8):
        leave(tmp_path, rank, ValueError(f"{rank}")).publish()
        said = json.loads((tmp_path / "error.json").read_text())
        assert rank in [said["rank"], *(other["rank"] for other in said["others"])]
    assert len(said["others"]) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["error.json", "errors"]
    assert not list((tmp_path / "errors").glob("*.tmp"))


def test_a_rank_that_is_in_it_already_does_not_read_the_records_of_all(tmp_path: Path, monkeypatch):
    logs = [leave(tmp_path, rank, ValueError(f"{rank}")) for rank in range(8)]
    reads: list[int] = []
    plain = FailureLog.records
    monkeypatch.setattr(FailureLog, "records", lambda self: reads.append(self.rank) or plain(self))
    for log in logs:
        log.publish()
    assert reads == [0]


def test_damaged_records_and_a_damaged_error_json_are_passed_over(tmp_path: Path):
    log = leave(tmp_path, 3, ValueError("no good"))
    for number, text in enumerate(("", "{", "[]", '{"rank": 1}')):
        (tmp_path / "errors" / f"rank-{number + 10:05d}.json").write_text(text)
    (tmp_path / "error.json").write_text('{"rank": 3')
    log.publish()
    assert json.loads((tmp_path / "error.json").read_text())["others"] == []


def test_a_disk_that_fails_keeps_no_process_from_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "errors").write_text("in the way")
    leave(tmp_path, 0, ValueError("no good")).publish()
    assert not (tmp_path / "error.json").exists()
    monkeypatch.setattr("cloze.distributed.resilience.error_records.DISK_SECONDS", 0.05)
    answers = threading.Event()
    monkeypatch.setattr("cloze.distributed.resilience.error_records.sync", lambda path: answers.wait(30))
    (tmp_path / "errors").unlink()
    begin = time.monotonic()
    leave(tmp_path, 0, ValueError("no good"))
    assert time.monotonic() - begin < 5
    assert not list((tmp_path / "errors").glob("rank-*.json"))
    answers.set()


def test_what_an_earlier_start_left_is_forgotten(tmp_path: Path):
    for rank in range(6):
        leave(tmp_path, rank, ValueError("no good")).publish()
    FailureLog(tmp_path, 1, 4).begin()
    assert [record["rank"] for record in FailureLog(tmp_path, 1, 4).records()] == [0, 2, 3, 4, 5]
    FailureLog(tmp_path, 0, 4).begin()
    assert [record["rank"] for record in FailureLog(tmp_path, 0, 4).records()] == [2, 3]  # who may have failed again
    assert not (tmp_path / "error.json").exists()
    forget(tmp_path)
    assert list(tmp_path.iterdir()) == []
    forget(tmp_path)


def test_a_new_start_in_the_folder_forgets_too_but_not_in_a_folder_that_holds_another_run(tmp_path: Path):
    config = TrainConfig(dataset_name="data", output_dir=str(tmp_path))
    leave(tmp_path, 0, ValueError("no good")).publish()
    open_run_folder(config, {}, {})
    assert not [name for name in ("error.json", "errors") if (tmp_path / name).exists()]
    (tmp_path / "metrics.jsonl").touch()
    leave(tmp_path, 0, ValueError("no good")).publish()
    with pytest.raises(ConfigError, match="holds a run already"), kept_failures(config):
        open_run_folder(config, {}, {})
    assert json.loads((tmp_path / "error.json").read_text())["error"] == "ValueError: no good"


def test_what_goes_wrong_before_the_ranks_have_joined_is_kept_where_a_run_goes_on(tmp_path: Path):
    going_on = TrainConfig(dataset_name="data", output_dir=str(tmp_path / "run"), resume_from_checkpoint="auto")
    for there in (False, True):
        if there:
            open_run_folder(going_on, {}, {})
        with pytest.raises(DataError) as caught, kept_failures(going_on), error_phase("data"):
            raise DataError("gone")
        assert report_error(caught.value) == 2
        assert (tmp_path / "run").exists() == there
    kept = json.loads((tmp_path / "run" / "error.json").read_text())
    assert (kept["rank"], kept["phase"], kept["error"], kept["exit_code"]) == (0, "data", "gone", 2)


def test_the_innermost_phase_of_an_error_counts():
    with pytest.raises(DataError) as caught, error_phase("train", 3), error_phase("save", 4):
        raise DataError("gone")
    assert phase_of(caught.value) == ("save", 4)
    assert phase_of(ValueError()) == ("start", None)


@pytest.mark.parametrize(
    ("numbers", "text"), [([1], "rank 1"), ([3, 1, 2], "ranks 1-3"), ([1, 2, 4, 6, 7], "ranks 1-2, 4, 6-7")]
)
def test_many_ranks_are_named_in_few_words(numbers, text):
    assert format_ranks(numbers) == text


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    for name in ("FIRST_WORD_SECONDS", "ELSEWHERE_SECONDS", "SETTLE_SECONDS"):
        monkeypatch.setattr(reporting, name, 0.02)
    monkeypatch.setattr("signal.signal", lambda *_: None)


def say_on(rank: int, error: Exception, monkeypatch, capsys, **environment: str) -> str:
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: "far")
    report_error(error)
    return str(capsys.readouterr().err)


def test_a_rank_alone_with_its_error_says_it_before_there_is_a_folder(quick, monkeypatch, capsys):
    assert say_on(0, DataError("gone"), monkeypatch, capsys) == "cloze: error: gone\n"
    assert say_on(3, DataError("gone"), monkeypatch, capsys) == "[rank 3 @ far] cloze: error: gone\n"
    two_hosts = {"LOCAL_WORLD_SIZE": "4"}
    assert say_on(0, DataError("gone"), monkeypatch, capsys, **two_hosts) == "[rank 0 @ far] cloze: error: gone\n"
    common = DataError("gone")
    console_only = say_on(0, common, monkeypatch, capsys)
    from cloze.errors import mark_all_ranks

    mark_all_ranks(common)
    assert console_only.count("gone") == 1
    assert say_on(3, common, monkeypatch, capsys) == ""  # rank 0 is known to have it too


def test_of_all_ranks_with_one_error_one_speaks_though_it_asks_last(quick, monkeypatch, capsys, tmp_path):
    """Rank 0 is late with its record, and another has spoken already: nobody says it again."""
    errors = {rank: TrainingError("loss is nan") for rank in (2, 3, 0)}
    said = ""
    for rank, error in errors.items():
        leave(tmp_path, rank, error)
        said += say_on(rank, error, monkeypatch, capsys)
    assert said == "[rank 2 @ far] cloze: error: loss is nan\n"
    errors = {rank: TrainingError("another") for rank in errors}
    for rank, error in errors.items():
        leave(tmp_path, rank, error)
    said = "".join(say_on(rank, error, monkeypatch, capsys) for rank, error in errors.items())
    assert said == "cloze: error: another (and on ranks 2-3)\n"


def test_where_the_host_of_rank_0_is_gone_the_lowest_that_is_left_speaks_and_the_first_of_each_other_host(
    quick, monkeypatch, capsys, tmp_path
):
    """A cut cable may keep hosts from hearing each other. Here rank 4 is gone, too."""
    errors = {rank: LostRank("rank 0 on far died", loud=True, lost=lost(0, 9.0)) for rank in (6, 5, 8, 9)}
    for rank, error in errors.items():
        leave(tmp_path, rank, error)
    said = []
    for rank, error in errors.items():
        monkeypatch.setenv("LOCAL_RANK", str(rank % 4))
        said.append(say_on(rank, error, monkeypatch, capsys))
    line = "[rank {} @ far] cloze: error: rank 0 on far died\n"
    assert said == ["", line.format(5), line.format(8), ""]
    assert json.loads((tmp_path / "error.json").read_text())["rank"] == 0


def test_other_ranks_let_only_errors_of_libraries_through():
    import subprocess
    import sys

    script = (
        "import sys, logging, warnings, threading\n"
        "from cloze.utils.terminal.console import silence_other_ranks, say, warn\n"
        "silence_other_ranks()\n"
        "import transformers\n"
        "log = transformers.utils.logging.get_logger('transformers.some')\n"
        "other = logging.getLogger('DeepSpeed'); other.addHandler(logging.StreamHandler(sys.stdout))\n"
        "for one in (log, other, logging.getLogger('accelerate')):\n"
        "    one.setLevel('INFO'); one.info('chatter'); one.warning('chatter'); one.error('trouble')\n"
        "warnings.warn('chatter'); say('train', 'chatter'); warn('chatter'); warn('trouble', on_any_rank=True)\n"
        "def fail(): raise ValueError('trouble')\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join()\n"
    )
    heard = {}
    for rank in ("0", "3"):
        environment = os.environ | {"RANK": rank, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        heard[rank] = done.stdout + done.stderr
    assert "chatter" in heard["0"]
    assert "chatter" not in heard["3"]
    assert heard["3"].count("trouble") == heard["0"].count("trouble") == 5 + heard["3"].count("raise")
    own = [line for line in heard["3"].splitlines() if "ValueError" in line or "cloze: warning" in line]
    assert len(own) >= 2
    assert all(line.startswith("[rank 3 @ ") for line in own)
    assert console.front() == ""


def test_rank_0_leaves_its_exit_code_for_who_started_the_launcher(tmp_path: Path):
    """A launcher ends with a code of its own; slurm/train.sbatch reads this file to know whether to queue again."""
    argv = ["train", "--dataset_name", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "run")]

    def environment() -> None:
        os.environ["CLOZE_EXIT_FILE"] = str(tmp_path / f"exit-{os.environ['RANK']}")

    outcomes = ranks.cloze_ranks(argv, 2, "ddp", tmp_path / "log", environment)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert [path.name for path in tmp_path.glob("exit-*")] == ["exit-0"]
    assert (tmp_path / "exit-0").read_text() == "2\n"
