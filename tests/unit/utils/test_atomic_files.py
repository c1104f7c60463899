"""Folders are replaced whole, links are written through, and what cannot be removed or written is reported."""

from __future__ import annotations

import ast
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import cloze
from cloze.errors import DiskError
from cloze.utils.atomic_files import check_writable, remove_tree, replaced_folder

PACKAGE = Path(cloze.__file__).parent


def as_plain_user(act: Callable[[], None]) -> str:
    """Call it in a process without root's right to write everywhere; return the error's line, or ``."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        ctypes.CDLL(None).capset(header, data)
        try:
            act()
        except Exception as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as said:
        return said.read()


def fill(folder: Path, text: str) -> None:
    with replaced_folder(folder) as staged:
        (staged / "file").write_text(text)


def test_a_folder_is_replaced_whole_and_nothing_else_is_touched(tmp_path: Path):
    for name in ("model.old", "model.new", "model.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    fill(tmp_path / "model", "one")
    fill(tmp_path / "model", "two")
    with pytest.raises(ValueError, match="no good"), replaced_folder(tmp_path / "model"):
        raise ValueError("no good")
    assert (tmp_path / "model" / "file").read_text() == "two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.new", "model.old", "model.tmp"]
    assert all((tmp_path / name / "mine").exists() for name in ("model.old", "model.new", "model.tmp"))


def test_a_link_to_another_disk_is_written_through_again_and_again(tmp_path: Path):
    (tmp_path / "big").mkdir()
    (tmp_path / "run").mkdir()
    fill(tmp_path / "big" / "model", "before")
    (tmp_path / "run" / "model").symlink_to("../big/model")
    for text in ("one", "two"):
        fill(tmp_path / "run" / "model", text)
        assert (tmp_path / "big" / "model" / "file").read_text() == text
        assert (tmp_path / "run" / "model").is_symlink()
    assert [path.name for folder in ("big", "run") for path in (tmp_path / folder).iterdir()] == ["model", "model"]


def test_a_link_that_leads_nowhere_is_refused_before_anything_is_written(tmp_path: Path):
    (tmp_path / "model").symlink_to(tmp_path / "not-mounted" / "model")
    with pytest.raises(DiskError, match=r"a link to .*which does not exist"):
        fill(tmp_path / "model", "one")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_removing_a_link_leaves_its_target(tmp_path: Path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "target")
    for name in ("link", "nowhere", "folder", "missing"):
        remove_tree(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "mine"]


def test_what_cannot_be_removed_is_an_error_or_a_warning(tmp_path: Path, capfd):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    folder.chmod(0o555)
    line = as_plain_user(lambda: remove_tree(folder))
    assert line == f"DiskError: {folder}: cannot be removed: Permission denied; remove it yourself"
    assert as_plain_user(lambda: remove_tree(folder, quietly=True)) == ""
    assert "cannot be removed" in capfd.readouterr().err
    folder.chmod(0o755)


def test_a_place_that_cannot_be_written_is_known_before(tmp_path: Path):
    check_writable(tmp_path / "new" / "folder" / "file")
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(DiskError, match="a part of the path is a file"):
        check_writable(tmp_path / "file" / "x")
    tmp_path.chmod(0o555)
    for path in (tmp_path / "file", tmp_path / "new" / "x"):
        line = as_plain_user(lambda path=path: check_writable(path, "try --output"))  # type: ignore[misc]
        assert line == f"DiskError: {path}: cannot write: Permission denied; try --output"
    tmp_path.chmod(0o755)


def test_trees_are_removed_in_one_place():
    """`shutil.rmtree` refuses links, and with ignore_errors it goes on after it has failed."""
    for path in sorted(PACKAGE.rglob("*.py")):
        names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(ast.parse(path.read_text()))}
        assert "rmtree" not in names or path.name == "atomic_files.py", path
