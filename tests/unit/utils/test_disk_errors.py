"""Whatever the operating system says of a disk is one line, and what a run can do without does not end it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cloze.errors import DiskError
from cloze.training.logging import metrics
from cloze.training.logging.metrics import MetricsLog
from cloze.utils.atomic_files import append_text, auxiliary_write, disk_errors, write_text
from cloze.utils.output_file import check_output_file

NOT_OF_DISKS = {errno.EPIPE, errno.ESHUTDOWN, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECHILD}


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Within it, no file can be made larger than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def log_in(folder: Path, start_step: int = 0) -> MetricsLog:
    return MetricsLog(folder, SimpleNamespace(is_main_process=True), start_step)  # type: ignore[arg-type]


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", sorted(set(errno.errorcode) - NOT_OF_DISKS), ids=lambda one: errno.errorcode[one])
def test_every_error_of_a_disk_is_one_line(number: int):
    with pytest.raises(DiskError) as told, disk_errors("runs/x"):
        raise OSError(number, os.strerror(number))
    assert str(told.value).startswith(f"runs/x: cannot write: {os.strerror(number)}; ")


@pytest.mark.parametrize(
    "error", [OSError("no such model"), ConnectionResetError(104, "reset"), ChildProcessError(10, "")]
)
def test_what_no_disk_says_passes(error: OSError):
    with pytest.raises(type(error)) as told, disk_errors("runs/x"):
        raise error
    assert told.value is error


def test_a_place_that_takes_empty_files_only_is_known_before(tmp_path: Path):
    with files_of_at_most(1000), pytest.raises(DiskError, match="cannot write: File too large"):
        check_output_file(tmp_path / "eval.json")
    assert list(tmp_path.iterdir()) == []


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "lines"
    size = append_text(path, "one\n")
    with files_of_at_most(6), pytest.raises(DiskError):
        append_text(path, "two\n", size)
    assert path.read_text() == "one\n"
    path.write_text("one\ntw")  # the rest of an append that could not be cut off
    assert append_text(path, "two\n", size) == 8
    assert path.read_text() == "one\ntwo\n"


def test_lines_that_cannot_be_written_come_later_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = log_in(tmp_path)
    log.write({"step": 1, "loss": 1.0})
    with files_of_at_most(30):
        for step in (2, 3, 4):
            log.write({"step": step, "loss": 1.0})
    assert steps_in(tmp_path) == [1]
    assert capsys.readouterr().err.count("training does not depend on it") == 1
    log.write({"step": 5, "loss": 1.0})
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err == ""


def test_going_back_on_a_full_disk_drops_what_comes_again(tmp_path: Path):
    log = log_in(tmp_path)
    for step in (1, 2, 3):
        log.write({"step": step})
    with files_of_at_most(0):
        log.write({"step": 4})
        log.rewind(2)
        assert steps_in(tmp_path) == [1, 2]
        log.write({"step": 3})
    log.write({"step": 4})
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_what_is_kept_is_bounded_and_what_is_lost_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(metrics, "MOST_UNWRITTEN", 2)
    log = log_in(tmp_path)
    with files_of_at_most(0):
        for step in (1, 2, 3, 4):
            log.write({"step": step})
    log.close()
    assert steps_in(tmp_path) == [3, 4]
    assert "2 lines could not be written" in capsys.readouterr().err


def test_a_failed_write_is_reported_again_once_one_has_succeeded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "status.json"
    for room in (0, 0, 100, 0):
        with auxiliary_write(path), files_of_at_most(room):
            write_text(path, "words")
    assert capsys.readouterr().err.count("cannot write") == 2


@pytest.mark.parametrize("words", [["archs"], ["--version"], ["--help"]])
def test_output_that_a_full_disk_does_not_take_is_an_error(words: list[str]):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "cloze", *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("cloze: error: stdout")
    assert done.stderr.endswith(": cannot write: No space left on device; free some space, and run it again\n")
    assert done.stderr.count("\n") == 1


def test_output_that_one_command_lost_does_not_fail_the_next():
    from cloze.cli import main
    from cloze.utils.terminal.json_events import lost_output

    lost_output[:] = [OSError(errno.EFBIG, os.strerror(errno.EFBIG))]
    with pytest.raises(SystemExit) as leaving:
        main(["archs"])
    assert not leaving.value.code
