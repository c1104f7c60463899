"""What is stored of a parameter is all of it, whatever its shape."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from plain_engine import plain_engine

from cloze.checkpoint.format import MANIFEST, Position, read_manifest
from cloze.checkpoint.reader import PieceReader
from cloze.errors import CheckpointError, ConfigError, LaunchError
from cloze.training.checkpointing.restore import load_state
from cloze.training.checkpointing.saver import CheckpointSaver
from cloze.training.checkpointing.snapshot import frozen_tensors
from cloze.training.engines.base import Engine
from cloze.training.engines.deepspeed import _support

SHAPES = {"matrix": (3, 2), "one": (1,), "scalar": (), "row": (1, 1)}


class Odd(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))
        self.empty = torch.nn.Parameter(torch.ones(0, 4))


def training() -> Engine:
    module = Odd()
    return plain_engine(module, torch.optim.AdamW(module.parameters(), lr=0.1, fused=True))


def step(held: Engine, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in held.module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    held.optimizer.step()


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module"])
def test_a_checkpoint_never_stores_the_names_of_a_wrapper(wrapper: str):
    held = training()
    wrapped = torch.nn.Module()
    wrapped.add_module(wrapper, held.module)
    held.module = wrapped
    with pytest.raises(LaunchError, match=rf"other names .*{wrapper}\."):
        CheckpointSaver(held, lambda folder: folder.mkdir(), in_background=False)


def test_fp8_with_zero3_is_refused():
    _support(2, "fp8").check_precision("fp8")
    _support(3, "bf16").check_precision("bf16")
    with pytest.raises(ConfigError, match=r"--precision: .*ZeRO-3 .*fp8"):
        _support(3, "fp8").check_precision("fp8")


def weights(held: Engine) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in held.module.parameters()]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, list[torch.Tensor]]:
    """A checkpoint after two steps, and the weights after a third."""
    held = training()
    for seed in (1, 2):
        step(held, seed)
    saver = CheckpointSaver(held, lambda folder: folder.mkdir(), in_background=False)
    saver.save(tmp_path / "checkpoint-2", Position(2, 0, 0), {}, {"run": {}, "config": {}, "precision": "no"}, None)
    step(held, 3)
    return tmp_path / "checkpoint-2", weights(held)


def third_step(folder: Path) -> list[torch.Tensor]:
    held = training()
    with PieceReader(folder, read_manifest(folder)) as pieces:
        load_state(held, pieces)
    step(held, 3)
    return weights(held)


def test_a_step_after_resuming_is_the_step_without_a_stop(saved):
    folder, expected = saved
    for one, other in zip(third_step(folder), expected, strict=True):
        assert torch.equal(one, other)


def test_checkpoints_that_miss_the_steps_of_single_elements_are_resumed_too(saved):
    """As versions wrote them that took the step of a parameter of one element for no number."""
    folder, expected = saved
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in ("one", "row"):
        manifest["parameters"][name]["scalars"] = {}
    held = training()
    with PieceReader(folder, manifest) as pieces:
        load_state(held, pieces)
    step(held, 3)
    for one, other in zip(weights(held), expected, strict=True):
        assert torch.equal(one, other)


def test_a_step_that_was_stored_as_a_tensor_is_a_number(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, expected = saved
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["parameters"]["scalar"]["scalars"] = {}
    file = "rank-00000.safetensors"
    manifest["pieces"].append({"name": "scalar", "key": "step", "offset": 0, "length": 1, "file": file, "sum": 1})
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    save_file({**load_file(folder / file), "scalar:step": torch.tensor([5.0])}, old / file)
    with PieceReader(old, manifest) as pieces:
        assert pieces.numbers("scalar") == {"step": 5.0}  # not that of other parameters
    save_file({**load_file(folder / file), "scalar:step": torch.tensor([2.0])}, old / file)
    held = training()
    with PieceReader(old, manifest) as pieces:
        load_state(held, pieces)
    step(held, 3)
    for one, other in zip(weights(held), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("pieces", "there"),
    [([(0, 2), (3, 3)], 5), ([(0, 2), (2, 2)], 4), ([(1, 5)], 5), ([], 0)],
    ids=["hole", "end", "beginning", "nothing"],
)
def test_a_tensor_with_missing_elements_is_damaged(tmp_path: Path, pieces: list[tuple[int, int]], there: int):
    from safetensors.torch import save_file

    listed = []
    for number, (offset, length) in enumerate(pieces):
        file = f"rank-{number:05}.safetensors"
        save_file({"matrix:weight": torch.arange(offset, offset + length, dtype=torch.float32)}, tmp_path / file)
        listed.append({"name": "matrix", "key": "weight", "offset": offset, "length": length, "file": file, "sum": 0})
    manifest = {"parameters": {"matrix": {"shape": [3, 2], "trained": True, "scalars": {}}}, "pieces": listed}
    with PieceReader(tmp_path, manifest) as reader:
        with pytest.raises(CheckpointError, match=f"{there} of 6 elements of matrix:weight are there"):
            reader.read("matrix", "weight")
        if len(pieces) == 2:  # what does not touch the missing elements is read
            first, length = pieces[0][0], pieces[0][1]
            assert reader.read("matrix", "weight", first, length).tolist() == list(range(first, first + length))


def test_a_tensor_in_pieces_of_any_order_is_whole(tmp_path: Path):
    from safetensors.torch import save_file

    listed = []
    for number, (offset, length) in enumerate([(4, 2), (0, 1), (1, 3)]):
        file = f"rank-{number:05}.safetensors"
        save_file({"matrix:weight": torch.arange(offset, offset + length, dtype=torch.float32)}, tmp_path / file)
        listed.append({"name": "matrix", "key": "weight", "offset": offset, "length": length, "file": file, "sum": 0})
    manifest = {"parameters": {"matrix": {"shape": [3, 2], "trained": True, "scalars": {}}}, "pieces": listed}
    with PieceReader(tmp_path, manifest) as reader:
        assert reader.read("matrix", "weight").tolist() == [0, 1, 2, 3, 4, 5]
        for offset in range(6):
            for length in range(1, 7 - offset):
                expected = list(range(offset, offset + length))
                assert reader.read("matrix", "weight", offset, length).tolist() == expected


def half_frozen(value: float) -> Engine:
    """Return a state with one frozen parameter, which the module holds in bf16, as with DeepSpeed."""
    module, exact = Odd(), torch.full(SHAPES["matrix"], value)
    module.matrix = torch.nn.Parameter(exact.bfloat16(), requires_grad=False)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    engine = plain_engine(module, torch.optim.AdamW(trained.values(), lr=0.1))
    engine.frozen = {"matrix": exact}
    return engine


def test_frozen_weights_are_stored_and_read_back_in_fp32_even_if_the_engine_holds_them_in_bf16(tmp_path: Path):
    saver = CheckpointSaver(half_frozen(1 / 3), lambda folder: folder.mkdir(), in_background=False)
    saver.save(tmp_path / "checkpoint-1", Position(1, 0, 0), {}, {"run": {}, "config": {}, "precision": "bf16"}, None)
    exact, again = torch.full(SHAPES["matrix"], 1 / 3), half_frozen(0.0)
    with PieceReader(tmp_path / "checkpoint-1", read_manifest(tmp_path / "checkpoint-1")) as pieces:
        assert torch.equal(pieces.frozen("matrix"), exact)
        load_state(again, pieces)
    assert torch.equal(again.frozen["matrix"], exact)
    assert torch.equal(again.module.matrix, exact.bfloat16())


def test_a_rank_that_does_not_write_frozen_weights_takes_none_from_the_engine():
    held = half_frozen(1 / 3)
    held.rank, held.frozen = 1, {"matrix": None}
    assert frozen_tensors(held) == {}
