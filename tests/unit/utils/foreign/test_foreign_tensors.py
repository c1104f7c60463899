"""One hostile file per promise: safetensors headers, pickles and files of torch.save that a stranger made."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cloze.errors import CheckpointError, ClozeError, ConfigError
from cloze.export.consolidation.dcpfiles import METADATA, DcpFiles, runs
from cloze.utils.foreign.pickles import damaged_member, load_torch, load_torch_stream
from cloze.utils.foreign.safetensors_header import Header, load_tensors, open_tensors, read_header, shard_names

NOTHING = re.compile(r"nothing$")


def with_header(folder: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header, a value or its bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder / "model.safetensors"


def one(**facts: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **facts}}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ([], 0),
        (None, 0),
        (b"{", 0),
        (b"\xff\xff", 0),
        (b"[" * 100_000, 0),
        (one(), 7),
        (one(), 9),
        (one(dtype="F33"), 8),
        (one(dtype=["F32"]), 8),
        (one(shape=[2.0]), 8),
        (one(shape=[True, 2]), 8),
        (one(shape=[-1, -2]), 8),
        (one(shape=[1 << 70]), 8),
        (one(shape=[1] * 65), 4),
        (one(shape=[10**9, 10**9]), 8),
        (one(data_offsets=[8, 0]), 8),
        (one(data_offsets=[0]), 8),
        (one(data_offsets=[1, 9]), 9),
        (one(data_offsets=None), 8),
        ({"a": 3}, 0),
        ({**one(), "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, 8),
        ({"\x1b[2J": {"dtype": "F32", "shape": [2]}}, 8),
    ],
)
def test_a_header_that_does_not_describe_the_file_is_one_line(tmp_path: Path, header: Any, size: int):
    path = with_header(tmp_path, header, bytes(size))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "content", [b"", b"\x02", bytes(8), b"\xff" * 8 + b"{}", (1 << 40).to_bytes(8, "little") + b"{}"]
)
def test_a_header_longer_than_the_file_is_not_read(tmp_path: Path, content: bytes):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be .* bytes long"):
        read_header(tmp_path / "x")


def test_a_good_file_is_read_and_its_header_is_that_of_its_tensors(tmp_path: Path):
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(0, 5, dtype=torch.bfloat16), "c": torch.tensor(True)}
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "m.safetensors")
    assert {name: facts.shape for name, facts in header.items()} == {"a": (2, 3), "b": (0, 5), "c": ()}
    assert header["a"] == Header("F32", (2, 3), header["a"].start, header["a"].start + 24)
    assert torch.equal(load_tensors(tmp_path / "m.safetensors")["a"], tensors["a"])
    with open_tensors(tmp_path / "m.safetensors") as opened:
        assert set(opened.keys()) == set(tensors)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b.safetensors", "..", 7, None])
def test_an_index_of_weights_names_files_of_its_folder_only(tmp_path: Path, name: Any):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert shard_names(path) == {"a": "model-00001-of-00002.safetensors"}
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    if isinstance(name, str):
        with pytest.raises(CheckpointError, match="outside its folder"):
            shard_names(path)
    path.write_text(json.dumps({"weight_map": [name]}))
    with pytest.raises(CheckpointError, match="not an index"):
        shard_names(path)


def checkpoint(folder: Path, **changes: Any) -> Path:
    """A checkpoint of torch.distributed.checkpoint with one tensor, `changes` made to what describes it."""
    stream = io.BytesIO()
    torch.save(torch.zeros(4, 4), stream)
    (folder / "__0_0.distcp").write_bytes(stream.getvalue())
    given: dict[str, Any] = {
        "size": torch.Size([4, 4]),
        "offsets": torch.Size([0, 0]),
        "sizes": torch.Size([4, 4]),
        "path": ("weight",),
        "file": "__0_0.distcp",
        "start": 0,
        "length": len(stream.getvalue()),
        **changes,
    }
    facts = TensorStorageMetadata(
        TensorProperties(torch.float32), given["size"], [ChunkStorageMetadata(given["offsets"], given["sizes"])]
    )
    info = _StorageInfo(given["file"], given["start"], given["length"])
    metadata = Metadata(
        {"weight": facts}, {"weight": given["path"]}, {MetadataIndex("weight", given["offsets"]): info}
    )
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    return folder


def _doubled(depth: int) -> Any:
    value: Any = ("x",)
    for _ in range(depth):
        value = (value, value)
    return value


def with_doubled_key() -> bytes:
    """A pickle of a mapping with one key of 2^60 parts, in 250 bytes."""
    text = b"\x80\x04}(" + b"\x8c\x01x\x85\x94"
    for number in range(60):
        text += b"h" + bytes([number]) + b"\x86\x94"
    return text + b"K\x01u."


def test_a_huge_tensor_without_elements_is_no_work():
    assert list(runs((10**9 + 1, 2, 0), (0, 0, 0), (10**9, 1, 0))) == []


def test_the_checkpoint_that_is_changed_below_is_good(tmp_path: Path):
    files = DcpFiles(checkpoint(tmp_path))
    files.verify()
    assert torch.equal(next(files.trained["weight"].pieces())[1], torch.zeros(16))


@pytest.mark.parametrize(
    "changes",
    [
        {"size": torch.Size([10**9, 10**9]), "sizes": torch.Size([10**9, 10**9])},
        {"sizes": torch.Size([16])},
        {"size": torch.Size([10**9, 4])},
        {"size": (4, _doubled(40))},
        {"size": [2.5, 4]},
        {"size": (1,) * 100},
        {"path": _doubled(60)},
        {"path": ("w\x1b[2J",)},
        {"path": 3},
        {"length": 10**15},
        {"length": -5},
        {"start": 10**15},
        {"file": 3},
    ],
)
def test_a_small_description_of_much_work_is_refused(tmp_path: Path, changes: dict[str, Any]):
    with pytest.raises(ClozeError) as caught:
        DcpFiles(checkpoint(tmp_path, **changes))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/x", "..", "a\x1bb"])
def test_a_checkpoint_names_files_of_its_own_folder_only(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match="outside"):
        DcpFiles(checkpoint(tmp_path, file=name))


def test_a_part_of_a_checkpoint_that_is_a_link_is_refused(tmp_path: Path):
    (tmp_path / "ck").mkdir()
    folder = checkpoint(tmp_path / "ck")
    (folder / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        DcpFiles(folder)


def test_a_key_that_takes_ages_to_hash_is_refused_before_it_is_hashed(tmp_path: Path):
    (tmp_path / METADATA).write_bytes(with_doubled_key())
    with pytest.raises(CheckpointError, match="a key is neither"):
        DcpFiles(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04" + b"(" * 10_000 + b".",
        b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"x.",
        b"\x80\x04" + b"]\x94" + b"h\x00h\x00a" * 5 + b"0.",
        b"ctorch\nSize\n(lp0\ng0\na\x85R.",
        b"cpathlib\nPurePosixPath\nN}V_parts\nK\x01s\x86b.",
        b"\x80\x04\x82\x01.",
        b"P1\n.",
    ],
)
def test_a_damaged_pickle_is_one_line(tmp_path: Path, content: bytes):
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(ClozeError) as caught:
        DcpFiles(tmp_path)
    assert str(caught.value).isprintable()


def archive(file: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch.save with this pickle in it."""
    with zipfile.ZipFile(file, "w", compression) as members:
        members.writestr("archive/data.pkl", pickled)
        members.writestr("archive/version", "3\n")
        members.writestr("archive/byteorder", "little")
        members.writestr("archive/data/0", bytes(1 << 16))
    return file


def test_a_file_of_torch_with_compressed_members_is_refused(tmp_path: Path):
    file = archive(tmp_path / "bomb.pt", pickle.dumps({}, 2), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        load_torch(file, "it", NOTHING, "")
    with pytest.raises(ValueError, match="compressed"):
        damaged_member(file)


def test_a_file_of_torch_whose_pickle_costs_more_than_its_size_is_refused(tmp_path: Path):
    file = archive(tmp_path / "slow.pt", with_doubled_key().replace(b"\x80\x04", b"\x80\x02"))
    with pytest.raises(CheckpointError, match="a key is neither"):
        load_torch(file, "it", NOTHING, "")
    with open(file, "rb") as stream, pytest.raises(pickle.UnpicklingError, match="a key is neither"):
        load_torch_stream(stream)


def test_what_torch_saves_is_read(tmp_path: Path):
    torch.save({"a": torch.ones(3), "b": {1: (2, "x")}, "c": torch.Size([2])}, tmp_path / "a.pt")
    found = load_torch(tmp_path / "a.pt", "it", NOTHING, "")
    assert torch.equal(found["a"], torch.ones(3))
    assert (found["b"], found["c"]) == ({1: (2, "x")}, torch.Size([2]))
