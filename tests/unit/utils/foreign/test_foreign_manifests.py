"""Manifests whose checksum is right, made by a stranger: one line each, and no file elsewhere is opened."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from manifests import CHECKPOINT, PREPARED, SHA

from cloze.checkpoint.format import read_manifest, signed, verify_checkpoint
from cloze.data.prepared.blocks import Blocks
from cloze.data.prepared.packing import Packed
from cloze.data.prepared.shards import ShardWriter, manifest_checksum, open_prepared
from cloze.errors import CheckpointError, ConfigError, DataError, HubError
from cloze.export.hub.publish import checkpoint_files, files_to_push, refuse_tokens
from cloze.utils.foreign.schema import COUNT, Each, check, optional


def at(value: Any, path: str, new: Any) -> Any:
    """A copy of a value with something else at a place: `pieces.0.file`."""
    value = copy.deepcopy(value)
    inner, *keys = value, *path.split("/")
    for key in keys[:-1]:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[int(keys[-1]) if isinstance(inner, list) else keys[-1]] = new
    return value


def checkpoint(folder: Path, manifest: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "checkpoint.json").write_text(json.dumps(signed(manifest)))
    return folder


def test_the_manifest_that_is_changed_below_is_good(tmp_path: Path):
    assert read_manifest(checkpoint(tmp_path, CHECKPOINT)) == CHECKPOINT


CHANGES = [
    ("position", 3),
    ("position/global_step", "1"),
    ("position/global_step", -1),
    ("position/samples_seen", True),
    ("position/tokens_seen", 1.5),
    ("optimizer", None),
    ("optimizer/groups", {}),
    ("optimizer/groups/0/params", "a"),
    ("optimizer/groups/0/params", ["b"]),
    ("parameters", []),
    ("parameters/a", None),
    ("parameters/a/shape", "23"),
    ("parameters/a/shape", [2.0, 3]),
    ("parameters/a/shape", [1 << 40, 1 << 40]),
    ("parameters/a/shape", [10**9] * 1000),
    ("parameters/a/trained", 1),
    ("parameters/a/scalars", []),
    ("tied", {"b": 3}),
    ("run", []),
    ("config", "x"),
    ("precision", ["no"]),
    ("precision", "fp64"),
    ("loss_scale", "big"),
    ("evaluation_pending", "no"),
    ("pieces", {}),
    ("pieces/0", []),
    ("pieces/0/file", "../x"),
    ("pieces/0/file", "other.safetensors"),
    ("pieces/0/offset", 1),
    ("pieces/0/length", "6"),
    ("pieces/0/sum", 1 << 70),
    ("pieces/0/name", "b"),
    ("pieces/0/name", "\x1b[2J"),
    ("files", []),
    ("files/r.safetensors", 3),
    ("files/r.safetensors/bytes", "3"),
    ("files/r.safetensors/sha256", "x"),
    ("files/..\x00", {"bytes": 3, "sha256": SHA}),
]


@pytest.mark.parametrize(("path", "new"), CHANGES)
def test_a_signed_manifest_of_a_checkpoint_with_a_wrong_value_is_one_line(tmp_path: Path, path: str, new: Any):
    with pytest.raises(CheckpointError) as caught:
        read_manifest(checkpoint(tmp_path, at(CHECKPOINT, path, new)))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["position", "optimizer", "parameters", "tied", "run", "config", "pieces", "files"])
def test_a_signed_manifest_of_a_checkpoint_without_a_part_is_one_line(tmp_path: Path, name: str):
    with pytest.raises(CheckpointError, match=f"it has no {name}"):
        read_manifest(checkpoint(tmp_path, {key: value for key, value in CHECKPOINT.items() if key != name}))


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/../../secret", "a//b"])
@pytest.mark.parametrize("reader", [verify_checkpoint, checkpoint_files])
def test_a_checkpoint_lists_no_files_elsewhere(tmp_path: Path, name: str, reader: Callable[[Path], Any]):
    (tmp_path / "secret").write_text("key")
    with pytest.raises(CheckpointError, match="files"):
        reader(checkpoint(tmp_path / "ck", at(CHECKPOINT, "files", {name: {"bytes": 3, "sha256": SHA}})))


@pytest.mark.parametrize("reader", [verify_checkpoint, checkpoint_files])
@pytest.mark.parametrize("inner", [False, True])
def test_a_file_of_a_checkpoint_that_is_a_link_is_refused(tmp_path: Path, reader: Any, inner: bool):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")
    name = "model/config.json" if inner else "config.json"
    folder = checkpoint(tmp_path / "ck", at(CHECKPOINT, "files", {name: {"bytes": 2, "sha256": SHA}}) | {"pieces": []})
    if inner:
        (folder / "model").symlink_to(tmp_path / "secret")
    else:
        (folder / "config.json").symlink_to(tmp_path / "secret" / "config.json")
    with pytest.raises(CheckpointError, match="symbolic link"):
        reader(folder)


def prepared(folder: Path, manifest: dict[str, Any]) -> Path:
    manifest = {**manifest, "checksum": manifest_checksum(manifest)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "train").mkdir(exist_ok=True)
    (folder / "train" / "d.arrow").write_bytes(b"abc")
    return folder


def test_the_manifest_of_blocks_that_is_changed_below_is_good(tmp_path: Path):
    opened = open_prepared(prepared(tmp_path, PREPARED))
    assert opened.splits == ["train"]
    with pytest.raises(DataError, match="it has no source"):
        opened.manifest["source"]


@pytest.mark.parametrize(
    ("path", "new"),
    [
        ("block_size", 0),
        ("block_size", "8"),
        ("block_size", 1 << 40),
        ("tokenizer", "t"),
        ("tokenizer/mask_token_id", "4"),
        ("tokenizer/special_token_ids", [None]),
        ("tokenizer/missing_token_ids", "x"),
        ("tokenizer/missing_token_ids", [-1]),
        ("splits", []),
        ("splits/train", None),
        ("splits/train/blocks", -1),
        ("splits/train/blocks", 2),
        ("splits/train/shards", {}),
        ("splits/train/shards", []),
        ("splits/train/shards", [PREPARED["splits"]["train"]["shards"][0]] * 2),
        ("splits/train", {"shards": [PREPARED["splits"]["train"]["shards"][0]] * 2}),
        ("splits/train", {"shards": []}),
        ("splits/train/shards/0/blocks", 0),
        ("splits/train", {"shards": [PREPARED["splits"]["train"]["shards"][0] | {"blocks": 0}]}),
        ("splits/train/shards/0/file", "../../secret"),
        ("splits/train/shards/0/file", 3),
        ("splits/train/shards/0/bytes", "3"),
        ("splits/train/shards/0/sha256", None),
        ("splits/..", {"blocks": 1, "shards": []}),
        ("bad_record_examples", [3]),
    ],
)
def test_a_signed_manifest_of_blocks_with_a_wrong_value_is_one_line(tmp_path: Path, path: str, new: Any):
    with pytest.raises(DataError) as caught:
        open_prepared(prepared(tmp_path, at(PREPARED, path, new)))
    assert str(caught.value).isprintable()


def test_a_token_id_without_a_token_is_inside_of_the_vocabulary(tmp_path: Path):
    facts = PREPARED["tokenizer"] | {"vocab_size": 9}
    with pytest.raises(DataError, match="token id 9 is outside of its vocabulary of 9"):
        open_prepared(prepared(tmp_path, at(PREPARED, "tokenizer", facts | {"missing_token_ids": [9]})))
    open_prepared(prepared(tmp_path, at(PREPARED, "tokenizer", facts | {"missing_token_ids": [8]})))


def test_a_tokenizer_behind_a_link_is_refused(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "tokenizer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="tokenizer: is a symbolic link"):
        open_prepared(prepared(tmp_path / "blocks", PREPARED))


@pytest.mark.parametrize("pieces", [False, True])
def test_shards_of_the_other_packing_are_refused(tmp_path: Path, pieces: bool):
    ids, one = np.zeros((1, 8), np.int32), np.ones(1, np.int32)
    writer = ShardWriter(tmp_path / "d.arrow", 8, pieces)
    writer.add(Packed(ids, one, 8 * one))
    writer.close()
    for has_pieces in (pieces, not pieces):
        blocks = Blocks([(tmp_path / "d.arrow", 1)], 8, has_pieces)
        if has_pieces == pieces:
            assert (blocks.read(np.array([0])) == ids).all()
            continue
        with pytest.raises(DataError, match=r"d\.arrow: cannot be read \(it has the columns input_ids"):
            blocks.read(np.array([0]))


def test_blocks_behind_a_link_are_refused(tmp_path: Path):
    folder = prepared(tmp_path, PREPARED)
    (folder / "train" / "d.arrow").rename(folder / "elsewhere")
    (folder / "train" / "d.arrow").symlink_to(folder / "elsewhere")
    with pytest.raises(DataError, match="symbolic link"):
        open_prepared(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "README.md", "model.safetensors"])
def test_a_link_in_a_model_folder_is_not_pushed(tmp_path: Path, name: str):
    (tmp_path / "key").write_text("secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    (tmp_path / "model" / name).symlink_to(tmp_path / "key")
    with pytest.raises(ConfigError, match="symbolic link"):
        files_to_push(tmp_path / "model")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.txt", "model/merges.txt", "loss.svg", "config.yaml", "notes"]
)
def test_a_token_in_any_text_that_is_pushed_is_found(tmp_path: Path, name: str):
    token = b"hf_" + b"a" * 34
    (tmp_path / "file").write_bytes(b" " * ((1 << 24) - 10) + token)
    for content in (tmp_path / "file", b"x " + token):
        with pytest.raises(HubError, match="token"):
            refuse_tokens({name: content})
    refuse_tokens({name: b"hf_short", "model.safetensors": token})


def test_a_shape_names_the_place_of_a_wrong_value():
    shape = {"a": [{"b": COUNT}], "?c": Each(optional(str))}
    check({"a": [], "c": {"x": None, "y": "z"}, "more": 1}, shape)
    with pytest.raises(ValueError, match=r"a\[1\]\.b cannot be -1"):
        check({"a": [{"b": 1}, {"b": -1}]}, shape)
    with pytest.raises(ValueError, match=r"c\.x cannot be 3"):
        check({"a": [], "c": {"x": 3}}, shape)
