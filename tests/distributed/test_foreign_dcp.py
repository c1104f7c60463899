"""FSDP checkpoints that Trainer, accelerate and torch wrote become the model that was trained, to the bit, without
running anything that is in them; what is damaged or missing is named."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
import torch.distributed.checkpoint as dcp
from foreign_conversion import DECODER, EMBEDDINGS, Attack, assert_trained, convert, written

from cloze.errors import CheckpointError, ConfigError
from cloze.export.consolidation.dcpfiles import METADATA, DcpFiles, runs

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Path:
    return prepared.parent / "tokenizer"


def saved(folder: Path, state: dict[str, Any]) -> Path:
    """A checkpoint of one process."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def test_what_accelerates_fsdp_wrote_becomes_the_model_that_was_trained(tokenizer: Path, tmp_path: Path, capsys):
    theirs = written(foreign.by_accelerates_fsdp, tmp_path, 2)
    assert sorted(path.name for path in (theirs / "pytorch_model_fsdp_0").iterdir())[:2] == [METADATA, "__0_0.distcp"]
    convert(theirs, tmp_path / "model", tokenizer, theirs / "config")
    assert_trained(tmp_path / "model", theirs)
    assert "(torch.distributed.checkpoint) ->" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_so_does_what_torch_wrote_of_a_model_that_fully_shard_divided(
    tokenizer, tmp_path, tied: bool, world_size: int
):
    theirs = written(foreign.by_torch, tmp_path, world_size, tied=tied)
    convert(theirs, tmp_path / "model", tokenizer, theirs / "config")
    assert_trained(tmp_path / "model", theirs)


@pytest.mark.slow
def test_so_does_what_trainer_wrote(tokenizer: Path, tmp_path: Path):
    theirs = written(foreign.by_trainers_fsdp, tmp_path, 2, tokenizer=str(tokenizer))
    for number, checkpoint in enumerate(
        (theirs, theirs / "checkpoint-2", theirs / "checkpoint-2/pytorch_model_fsdp_0")
    ):
        convert(checkpoint, tmp_path / f"model-{number}", tokenizer, theirs / "config")
        assert_trained(tmp_path / f"model-{number}", theirs)


@pytest.mark.parametrize("state", [lambda model: {"model": model, "optimizer": {"lr": torch.ones(3)}}, lambda m: m])
def test_a_plain_state_dict_and_one_beside_an_optimizer_are_read(tmp_path: Path, state):
    model = foreign.small_model().state_dict()
    files = DcpFiles(saved(tmp_path / "dcp", state(model)))
    files.verify()
    assert files.trained.keys() == model.keys()
    for name, tensor in model.items():
        pieces = list(files.trained[name].pieces())
        assert [offset for offset, _ in pieces] == [0]
        assert torch.equal(pieces[0][1], tensor.reshape(-1)), name


def test_rectangles_of_any_cut_lie_where_the_runs_say():
    shape = (5, 4, 6)
    whole = torch.arange(120).view(shape)
    for offsets, sizes in (((0, 0, 0), shape), ((2, 0, 0), (3, 4, 6)), ((1, 1, 0), (2, 2, 6)), ((3, 1, 2), (2, 3, 3))):
        part = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].reshape(-1)
        found = list(runs(shape, offsets, sizes))
        assert sum(length for *_, length in found) == part.numel()
        for place, offset, length in found:
            assert part[place : place + length].tolist() == list(range(offset, offset + length))
        if sizes[1:] == shape[1:]:
            assert len(found) == 1, "rows are one run"
    assert list(runs((), (), ())) == [(0, 0, 1)]


def planted(folder: Path, file: str, ran: Path) -> None:
    """Put an object whose reading runs a command into a file of a checkpoint."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    if file == METADATA:
        metadata.planner_data = Attack(ran)
    else:
        torch.save({"tensor": torch.zeros(9000), "surprise": Attack(ran)}, folder / file)
        next(iter(metadata.storage_data.values())).length = (folder / file).stat().st_size
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (METADATA, r"it holds a Python object, posix.system, and reading it could run code"),
        ("__0_0.distcp", r"the part of weight in it is more than a tensor, and reading it could run code"),
    ],
)
def test_nothing_that_lies_in_a_file_is_run(tmp_path: Path, file: str, message: str):
    folder = saved(tmp_path / "dcp", {"weight": torch.zeros(9000)})
    planted(folder, file, tmp_path / "ran")
    with pytest.raises(ConfigError, match=message):
        list(DcpFiles(folder).trained["weight"].pieces())
    assert not (tmp_path / "ran").exists()
    if file == METADATA:
        pickle.loads((folder / file).read_bytes())
    else:
        torch.load(folder / file, weights_only=False)
    assert (tmp_path / "ran").exists(), "the attack is none"


def test_a_file_that_is_cut_short_or_has_a_flipped_bit_or_is_missing_is_named(tmp_path: Path):
    folder = saved(tmp_path / "dcp", {"weight": torch.zeros(9000)})
    file = folder / "__0_0.distcp"
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as records:
        largest = max(records.infolist(), key=lambda record: record.file_size)
    at = largest.header_offset + 200  # past its name and alignment
    for content in (whole[: len(whole) // 2], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"__0_0.distcp: the part of weight in it is damaged"):
            DcpFiles(folder).verify()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: it is missing, with a part of weight"):
        DcpFiles(folder)
    metadata = (folder / METADATA).read_bytes()
    for content in (metadata[: len(metadata) // 2], b"", pickle.dumps({"a": 1}), b"rubbish"):
        (folder / METADATA).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"\.metadata: it is "):
            DcpFiles(folder)


@pytest.mark.parametrize(
    ("what", "message"), [("gap", "4 of 6 elements of weight"), ("overlap", "do not fit together")]
)
def test_parts_that_do_not_make_up_the_tensor_are_noticed(tmp_path: Path, what: str, message: str):
    folder = saved(tmp_path / "dcp", {"weight": torch.zeros(4)})
    metadata = pickle.loads((folder / METADATA).read_bytes())
    facts = metadata.state_dict_metadata["weight"]
    if what == "gap":
        facts.size = torch.Size([6])
    else:
        facts.chunks.append(facts.chunks[0])
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=message):
        DcpFiles(folder)


def test_a_file_outside_of_the_checkpoint_is_not_read(tmp_path: Path):
    folder = saved(tmp_path / "dcp", {"weight": torch.zeros(4)})
    metadata = pickle.loads((folder / METADATA).read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = os.path.join("..", "dcp", "__0_0.distcp")
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match="it names a file outside"):
        DcpFiles(folder)


def test_weights_that_were_trained_apart_are_not_tied(tokenizer: Path, tmp_path: Path):
    model = foreign.small_model(tied=False)
    folder = saved(tmp_path / "dcp", model.state_dict())
    assert not torch.equal(model.state_dict()[DECODER], model.state_dict()[EMBEDDINGS])
    model.config.tie_word_embeddings = True
    model.config.save_pretrained(tmp_path / "config")
    with pytest.raises(ConfigError, match="were trained apart"):
        convert(folder, tmp_path / "model", tokenizer, tmp_path / "config")
