"""What a command's result must not replace: devices, pipes, links, and files of models, runs and data."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from cloze.cli.commands import archs
from cloze.config import ArchsConfig
from cloze.errors import DiskError
from cloze.utils.atomic_files import write_text
from cloze.utils.output_file import check_output_file


def refused(path: Path, line: str) -> None:
    before = path.lstat() if os.path.lexists(path) else None
    for write in (
        lambda: check_output_file(path),
        lambda: archs.run(ArchsConfig(model_type="bert", output=str(path))),
    ):
        with pytest.raises(DiskError, match=line):
            write()
    assert before is None or os.path.samestat(path.lstat(), before)


def test_an_output_file_that_is_a_folder_or_in_none_is_known_before(tmp_path: Path):
    assert check_output_file(tmp_path / "new.json") == tmp_path / "new.json"
    refused(tmp_path, "is a folder, not a file; choose another --output")
    refused(tmp_path / "nodir" / "x.json", r"nodir does not exist; .*--output")
    assert list(tmp_path.iterdir()) == []


def test_pipes_sockets_and_devices_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is not a regular file")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # the name of a socket may have 107 bytes
        listening.bind("socket")
        refused(tmp_path / "socket", "is not a regular file")
    (tmp_path / "link").symlink_to("pipe")
    refused(tmp_path / "link", "is not a regular file")
    try:
        os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        return
    refused(tmp_path / "null", "is not a regular file")


def test_where_the_command_prints_is_not_replaced(tmp_path: Path):
    with (tmp_path / "log.txt").open("w") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            refused(tmp_path / "log.txt", "command's own output, .* leave the option out")
            (tmp_path / "stderr").symlink_to("/proc/self/fd/2")
            refused(tmp_path / "stderr", "command's own output")
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def test_a_link_to_a_file_stays_and_its_file_is_written(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("disk/real.json")
    archs.run(ArchsConfig(model_type="bert", output=str(tmp_path / "link.json")))
    assert (tmp_path / "link.json").is_symlink()
    assert "bert" in (tmp_path / "disk" / "real.json").read_text()
    (tmp_path / "nowhere").symlink_to("absent/x.json")
    refused(tmp_path / "nowhere", "is a link to .*absent/x.json, which does not exist")
    (tmp_path / "circle").symlink_to("circle")
    refused(tmp_path / "circle", "is not a regular file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "run.json", "metrics.jsonl"])
def test_files_of_models_and_runs_are_not_replaced(tmp_path: Path, name: str):
    (tmp_path / name).write_text("kept")
    refused(tmp_path / name, "may be a file of a model, a run or its data")
    assert (tmp_path / name).read_text() == "kept"


def test_results_are_replaced(tmp_path: Path):
    for name in ("eval.json", "report.html", "mine"):
        write_text(tmp_path / name, "old")
        assert check_output_file(tmp_path / name) == tmp_path / name
