"""One hostile file per promise: names, links, JSON and YAML that a stranger made."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from cloze.config.parser import parse
from cloze.errors import ConfigError, DataError, DiskError
from cloze.utils import atomic_files
from cloze.utils.atomic_files import write_json
from cloze.utils.foreign.json_yaml import (
    MAX_YAML_BYTES,
    dump_json,
    parse_json,
    parse_yaml,
    read_json,
    read_json_lines,
    read_mapping,
    read_yaml,
    yaml_names,
)
from cloze.utils.foreign.paths import check_regular, open_regular, plain_name, plain_path, read_bytes

NAMES = ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b", "a\x1bb", "a\nb", "x" * 300, None, 7, ["a"]]


@pytest.mark.parametrize("name", NAMES)
def test_only_plain_names_are_names(name: object):
    with pytest.raises(DataError):
        plain_name(name)


@pytest.mark.parametrize("name", ["../x", "a/../b", "/a", "a//b", "a/./b", "a/", "/".join("a" * 17), None])
def test_only_paths_of_plain_names_are_paths(name: object):
    with pytest.raises(DataError):
        plain_path(name)


def test_a_plain_name_and_path_are_returned_as_they_are():
    assert plain_name("model-00001-of-00002.safetensors") == "model-00001-of-00002.safetensors"
    assert plain_path("tokenizer/größe.json") == "tokenizer/größe.json"


def test_a_link_is_refused_by_name_unless_the_user_typed_it(tmp_path: Path):
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="symbolic link"):
        read_json(tmp_path / "config.json")
    assert read_json(tmp_path / "config.json", typed=True) == {}


def test_a_link_to_a_folder_inside_a_foreign_folder_is_refused(tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "key").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sub").symlink_to(tmp_path / "home")
    with pytest.raises(DataError, match="symbolic link"):
        open_regular(tmp_path / "model" / "sub" / "key", folder=tmp_path / "model")


def test_the_folder_that_the_user_typed_may_be_a_link(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "config.json").write_text("{}")
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    assert read_json(tmp_path / "model" / "config.json") == {}


def test_links_of_the_hubs_cache_are_followed_only_to_its_own_blobs(tmp_path: Path):
    repository = tmp_path / "models--someone--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "abc").write_text('{"a": 1}')
    (repository / "snapshots" / "rev").mkdir(parents=True)
    link = repository / "snapshots" / "rev" / "config.json"
    link.symlink_to("../../blobs/abc")
    assert read_json(link) == {"a": 1}
    (tmp_path / "secret").write_text("{}")
    (repository / "blobs" / "out").symlink_to(tmp_path / "secret")
    for target in ["../../blobs/out", "../../../secret", str(tmp_path / "secret")]:
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(DataError, match="symbolic link"):
            read_json(link)


def test_a_pipe_a_device_and_a_folder_are_no_files_and_are_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in [tmp_path / "pipe", Path("/dev/zero"), tmp_path]:
        for typed in [False, True]:
            with pytest.raises(DataError):
                check_regular(path, typed=typed)
    with pytest.raises(ConfigError, match="No such file"):
        read_bytes(tmp_path / "none", 10, error=ConfigError)


def test_a_file_beyond_its_limit_is_refused(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"a": "' + "x" * 100 + '"}')
    with pytest.raises(DataError, match="larger than 50 bytes"):
        read_json(tmp_path / "a.json", max_bytes=50)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b'{"a": ',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 200 + b"1" + b"}" * 200,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"\x00",
        b'{"a": 1}{}',
        b'{"\x1b]52;c;aGk=\x07": }',
    ],
)
def test_what_is_no_json_object_is_one_line(text: bytes):
    with pytest.raises(DataError) as caught:
        parse_json(text, "x.json")
    assert str(caught.value).isprintable()


def test_json_with_a_byte_order_mark_and_numbers_that_json_does_not_have_is_read():
    assert parse_json(b'\xef\xbb\xbf{"a": NaN, "b": -Infinity}', "x") == {"a": None, "b": None}


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\nb: *a\n",
        "a: !!python/object/apply:os.system [id]\n",
        "[" * 50 + "]" * 50,
        "- 1\n- 2\n",
        "",
        "a: 2020-13-45\n",
        "a: " + "9" * 5000 + "\n",
        "? [a]\n: 1\n",
        "a: [\n",
        "a: \x1b\n",
    ],
)
def test_what_is_no_plain_yaml_mapping_is_one_line(text: str):
    with pytest.raises(DataError) as caught:
        parse_yaml(text, "x.yaml")
    assert str(caught.value).isprintable()


def test_yaml_names_are_given_once():
    assert yaml_names("a: 1\nb: 2\n", "x") == ["a", "b"]
    with pytest.raises(DataError, match="twice"):
        yaml_names("a: 1\na: 2\n", "x")


UNCLEAR_WORDS = [
    "010",
    "-007",
    "08",
    "0o10",
    "0b11",
    "1_000",
    "1_0.5",
    "0x1_0",
    "1:30",
    "1:30:00",
    "-1:30",
    "yes",
    "No",
]


@pytest.mark.parametrize("word", [*UNCLEAR_WORDS, "ON", "off"])
def test_words_that_versions_of_yaml_read_differently_are_refused(word: str, tmp_path: Path):
    for text in (f"seed: {word}\n", f"a: [1, {word}]\n", f"{word}: 1\n"):
        with pytest.raises(DataError, match="in line 1 differs between YAML") as caught:
            parse_yaml(text, "x", typed=True)
        assert str(caught.value).isprintable()
        with pytest.raises(DataError):
            yaml_names(text, "x")
        parse_yaml(text, "x")  # of another program, which reads it as PyYAML does
    assert parse_yaml(f"seed: '{word}'\n", "x", typed=True) == {"seed": word}
    (tmp_path / "c.yaml").write_text(f"dataset_name: x\nseed: {word}\n")
    with pytest.raises(ConfigError, match="in line 2 differs"):
        parse(["train", "--output_dir", "x", "--config", str(tmp_path / "c.yaml")])


def test_words_that_only_look_like_numbers_stay_text():
    plain = "a: [0, 10, -3, 0.5, 1e-4, 1.5e+3, 0x10, true, nobody, yes-no, v1_0, a:b, 2024-01-01x, 10:99]\n"
    assert yaml_names(plain, "x") == ["a"]
    with pytest.raises(ConfigError, match="--seed: 1:30"):
        parse(["train", "--dataset_name", "x", "--output_dir", "x", "--seed", "1:30"])
    assert parse(["train", "--dataset_name", "1:30", "--output_dir", "010"])[1].output_dir == "010"


def test_a_mapping_that_cannot_be_read_is_empty(tmp_path: Path):
    bomb = tmp_path / "config.yaml"
    bomb.write_text(
        "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    )
    assert read_mapping(bomb) == {} == read_mapping(tmp_path / "none.json")
    bomb.write_bytes(b"a: 1\n" + b"#" * MAX_YAML_BYTES)
    assert read_mapping(bomb) == {}
    with pytest.raises(DataError):
        read_yaml(bomb)


def test_lines_that_are_no_objects_are_numbered_and_a_last_one_without_its_end_is_not(tmp_path: Path):
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1}\n[]\nx\n\n{"step": 2}\n{"st')
    assert read_json_lines(tmp_path / "m.jsonl", "step") == ([{"step": 1}, {"step": 2}], [2, 3])


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path):
    value = {"a": math.inf, "b": [1.0, math.nan, (-math.inf, {"c": math.nan})], "d": "NaN"}
    write_json(tmp_path / "eval.json", value)
    assert json.loads((tmp_path / "eval.json").read_text()) == {
        "a": None,
        "b": [1.0, None, [None, {"c": None}]],
        "d": "NaN",
    }
    assert dump_json({"a": 1}) == '{"a": 1}'


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "pipe"])
def test_nothing_is_written_through_what_lies_under_a_temporary_name(tmp_path: Path, monkeypatch, kind: str):
    victim, trap = tmp_path / "victim", tmp_path / "trap"
    if kind != "dangling link":
        victim.write_text("untouched")
    if kind.endswith("link"):
        trap.symlink_to(victim)
    elif kind == "file":
        trap.write_text("untouched")
    else:
        os.mkfifo(trap)
    monkeypatch.setattr(atomic_files, "temporary_name", lambda _: trap)
    with pytest.raises(DiskError):
        atomic_files.write_json(tmp_path / "eval.json", {"a": 1})
    with pytest.raises(DiskError), atomic_files.staged_folder(tmp_path / "model"):
        pytest.fail("a folder was made there")
    assert not victim.exists() if kind == "dangling link" else victim.read_text() == "untouched"
    assert not (tmp_path / "eval.json").exists()


def test_nobody_can_foresee_a_temporary_name(tmp_path: Path):
    first, second = atomic_files.temporary_name(tmp_path / "a"), atomic_files.temporary_name(tmp_path / "a")
    assert first != second
    assert str(os.getpid()) != first.name.removeprefix("a.tmp-")
    atomic_files.write_text(tmp_path / "a", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
