"""A save stores the state at the time of the call, also in the background; a failed save leaves no files."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plain_engine import plain_engine

import cloze.training.checkpointing.restore as restore_module
import cloze.training.checkpointing.saver as checkpoint_module
from cloze.checkpoint.format import EMA, MANIFEST, Position, find_checkpoint, list_checkpoints, read_manifest
from cloze.checkpoint.reader import PieceReader
from cloze.errors import CheckpointError, DiskError
from cloze.export.consolidation.stored import own_source
from cloze.training.checkpointing.restore import load_state
from cloze.training.checkpointing.saver import CheckpointSaver
from cloze.training.engines.base import Engine
from cloze.training.engines.deepspeed import DeepSpeedEngine
from cloze.training.engines.ema import _weights
from cloze.training.engines.sharded_state import Fragment, buffers, create_state

KEYS = ("weight", "exp_avg", "exp_avg_sq")
EXTRA = {"run": {}, "config": {}, "precision": "no"}


def make_training() -> Engine:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    return plain_engine(module, torch.optim.AdamW(module.parameters(), lr=0.1))


def take_step(training: Engine) -> None:
    training.optimizer.zero_grad()
    training.module(torch.ones(1, 3)).sum().backward()
    training.optimizer.step()


def save(saver: CheckpointSaver, folder: Path, step: int, keep: int | None = None) -> Path:
    saver.save(folder / f"checkpoint-{step}", Position(step, 0, 0), {}, dict(EXTRA), keep)
    return folder / f"checkpoint-{step}"


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint by "parameter:key"."""
    manifest = read_manifest(checkpoint)
    with PieceReader(checkpoint, manifest) as pieces:
        return {
            f"{name}:{key}": pieces.read(name, key).clone()
            for name in manifest["parameters"]
            for key in ("weight", *pieces.keys(name))
        }


def test_a_checkpoint_written_in_the_background_is_the_one_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Training continues before the thread writes."""
    training, go, write = make_training(), threading.Event(), checkpoint_module.write_tensors
    at_once = CheckpointSaver(training, lambda folder: folder.mkdir(), in_background=False)
    later = CheckpointSaver(training, lambda folder: folder.mkdir(), in_background=True)
    for step in (1, 2):  # the second one uses the buffers of the first
        take_step(training)
        expected = stored(save(at_once, tmp_path / "at-once", step))
        go.clear()
        monkeypatch.setattr(checkpoint_module, "write_tensors", lambda *given: (go.wait(30), write(*given))[1])
        checkpoint = save(later, tmp_path / "later", step)
        assert not checkpoint.exists()
        take_step(training)
        go.set()
        later.wait()
        monkeypatch.undo()
        found = stored(checkpoint)
        assert found.keys() == expected.keys() == {f"{name}:{key}" for name in ("weight", "bias") for key in KEYS}
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    later.wait()  # returns at once


def no_space(folder: Path) -> None:
    raise DiskError("no space left", where=folder)


def lose_a_file(folder: Path) -> None:
    folder.mkdir()
    (folder.parent / "rank-00000.safetensors").unlink()


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize(
    ("save_model_files", "says"), [(no_space, "no space left"), (lose_a_file, "rank 0 wrote rank-00000.safetensors")]
)
def test_a_save_that_fails_is_an_error_and_leaves_nothing(
    tmp_path: Path, in_background: bool, save_model_files: Callable[[Path], None], says: str
):
    """In the background, the error is raised by `wait`, once, or by the next save."""
    saver = CheckpointSaver(make_training(), save_model_files, in_background)

    def save_and(then: Callable[[], object]) -> None:
        save(saver, tmp_path, 1)
        then()

    for then in (saver.wait, lambda: save(saver, tmp_path, 2)):
        with pytest.raises(DiskError, match=says):
            save_and(then)
        assert list(tmp_path.iterdir()) == []
        saver.wait()


def test_a_tensor_that_is_stored_but_not_loaded_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    training = make_training()
    take_step(training)
    saver = CheckpointSaver(training, lambda folder: folder.mkdir(), in_background=False)
    checkpoint = save(saver, tmp_path, 1)
    with PieceReader(checkpoint, read_manifest(checkpoint)) as pieces:
        load_state(make_training(), pieces)
        monkeypatch.setattr(pieces, "keys", lambda name: ["exp_avg"])
        with pytest.raises(CheckpointError, match=r"\(2 tensors, bias:exp_avg_sq first\)"):
            load_state(make_training(), pieces)


def test_saving_and_loading_send_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    training, beats = make_training(), []
    take_step(training)
    monkeypatch.setattr(checkpoint_module, "beat", lambda: beats.append(1))
    monkeypatch.setattr(restore_module, "beat", lambda: beats.append(1))
    checkpoint = save(CheckpointSaver(training, lambda folder: folder.mkdir(), in_background=False), tmp_path, 1)
    assert len(beats) == 2 * len(KEYS)  # once per tensor
    with PieceReader(checkpoint, read_manifest(checkpoint)) as pieces:
        load_state(make_training(), pieces)
    assert len(beats) == 2 * len(KEYS) + 2 + 2  # once per fragment and once per parameter


def test_a_buffer_of_a_module_used_twice_is_stored_once():
    shared = torch.nn.BatchNorm1d(2, affine=False)
    names = [name for name, _ in buffers(torch.nn.ModuleDict({"one": shared, "other": shared}))]
    assert names == ["one.running_mean", "one.running_var", "one.num_batches_tracked"]


def test_checkpoints_of_models_of_other_shapes_are_not_averaged(tmp_path: Path):
    folders = []
    for step, features in ((1, 4), (2, 2)):
        module = torch.nn.Linear(3, features)
        training = plain_engine(module, torch.optim.AdamW(module.parameters()))
        saver = CheckpointSaver(training, lambda folder: folder.mkdir(), in_background=False)
        folders.append(save(saver, tmp_path, step))
    with ExitStack() as stack, pytest.raises(CheckpointError, match="has other parameters than checkpoint-2"):
        own_source(folders, stack)


def test_a_save_deletes_checkpoints_beyond_the_newest(tmp_path: Path):
    saver = CheckpointSaver(make_training(), lambda folder: folder.mkdir(), in_background=False)
    for step in (1, 2, 3):
        save(saver, tmp_path, step, keep=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_without_an_undamaged_checkpoint_there_is_none_or_an_error(tmp_path: Path):
    assert find_checkpoint(tmp_path) is None
    saver = CheckpointSaver(make_training(), lambda folder: folder.mkdir(), in_background=False)
    folders = [save(saver, tmp_path, step) for step in (1, 2)]
    assert find_checkpoint(tmp_path) == folders[1]
    for number, folder in enumerate(reversed(folders)):
        (folder / MANIFEST).write_text("{}")
        if number == 0:
            assert find_checkpoint(tmp_path) == folders[0]
    with pytest.raises(CheckpointError, match="all checkpoints are damaged"):
        find_checkpoint(tmp_path)


def test_a_fragment_knows_the_files_of_its_own_offloaded_weights():
    """Uses a stand-in with the attributes of DeepSpeed's optimizer: fp32 copies, and swap records by their ds_id."""
    module = torch.nn.Linear(3, 2).bfloat16()
    copies = [parameter.detach().float() for parameter in module.parameters()]
    for number, copy in enumerate(copies):
        copy.ds_id = 10 + number
    zero = SimpleNamespace(
        fp16_groups=[list(module.parameters())],
        fp32_groups=[copies],
        optimizer_swapper=SimpleNamespace(swap_params_info={10: "files of weight", 11: "files of bias"}),
    )
    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine.module, engine.optimizer = module, zero
    found = engine.fragments()
    assert [(one.name, one.swap) for one in found] == [("weight", "files of weight"), ("bias", "files of bias")]
    assert all(one.owner is copy for one, copy in zip(found, copies, strict=True))


def test_an_average_is_updated_with_the_weights_in_their_file(tmp_path: Path):
    owner, values = torch.zeros(0), torch.tensor([1.0, -2.0, 3.0])
    (tmp_path / "weight").write_bytes(values.numpy().tobytes())
    files = [SimpleNamespace(compute_tensor=owner, swap_path=str(tmp_path / "weight"))]
    swap = SimpleNamespace(numel=lambda: 3, dtype=lambda: torch.float32, tensors=files)
    assert torch.equal(_weights(owner, swap), values)
    assert torch.equal(_weights(values, None), values)


def test_the_average_of_offloaded_weights_is_a_file_beside_them_and_moments_are_deepspeeds(tmp_path: Path):
    """Uses a stand-in for DeepSpeed's record of a swapped tensor: the real one, which `test_offload.py -m slow` uses,
    needs a compiled extension."""
    owner = torch.zeros(0)
    owner.ds_id = 7

    def add_state_tensors(tensors: list[torch.Tensor]) -> None:
        swap.tensors += [SimpleNamespace(compute_tensor=one, swap_path=str(tmp_path / one.ds_id)) for one in tensors]

    swap = SimpleNamespace(
        numel=lambda: 6, dtype=lambda: torch.float32, swap_folder=str(tmp_path), tensors=[],
        add_state_tensors=add_state_tensors,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    create_state(optimizer, Fragment("weight", (2, 3), 0, 6, owner, 0, swap), ["exp_avg", EMA], {"step": 3.0})
    entries = optimizer.state[owner]
    assert entries[EMA].tolist() == [0.0] * 6
    assert (entries["exp_avg"].numel(), float(entries["step"])) == (0, 3.0)
    assert [one.compute_tensor is entries["exp_avg"] for one in swap.tensors] == [True]
