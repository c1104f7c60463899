"""The average includes the weights of every step, for parameters of any shape, but not the buffers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plain_engine import plain_engine

from cloze.checkpoint.format import EMA, Position, read_manifest
from cloze.checkpoint.reader import PieceReader
from cloze.training.checkpointing.restore import load_state
from cloze.training.checkpointing.saver import CheckpointSaver
from cloze.training.engines.base import Engine
from cloze.training.engines.ema import MovingAverage, decay_at

SHAPES = {"matrix": (3, 2), "one": (1,), "scalar": (), "row": (1, 1), "frozen": (2,)}


class Changing(torch.nn.Module):
    """A module with small parameters, one of them frozen, and with buffers that every step changes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            weight = torch.randn(shape, generator=generator)
            self.register_parameter(name, torch.nn.Parameter(weight, requires_grad=name != "frozen"))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def trained(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}


def training() -> Engine:
    module = Changing()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return plain_engine(module, torch.optim.AdamW(parameters, lr=0.1))


def step(held: Engine, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in held.module.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    held.optimizer.step()
    held.module.mean += seed
    held.module.count += 1
    held.module.scratch += 1


def averages(held: Engine) -> dict[str, torch.Tensor]:
    state = held.optimizer.state
    return {name: state[p][EMA].clone() for name, p in held.module.named_parameters() if EMA in state.get(p, {})}


@pytest.mark.parametrize(("decay", "at", "expected"), [
    (None, 0, None), (0.9, 0, 0.1), (0.9, 1, 2 / 11), (0.9, 79, 80 / 89), (0.9, 80, 0.9), (0.9, 81, 0.9),
    (0.05, 0, 0.05), (1.0, 10**9, (1 + 10**9) / (10 + 10**9)), (0.0, 5, 0.0),
])  # fmt: skip
def test_the_decay_grows_to_the_requested_one(decay: float | None, at: int, expected: float | None):
    assert decay_at(decay, at) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_average_includes_all_steps_even_for_parameters_of_one_element(dtype: torch.dtype):
    held = training()
    held.module.to(dtype)
    average, expected = MovingAverage(held.fragments(), held.state), None
    for number, (decay, refused) in enumerate([(0.1, False), (0.5, False), (0.9, True), (0.0, False), (1.0, False)]):
        before, weights = average.begin(), held.module.trained()
        assert len(before) == (0 if number else len(weights))
        expected = expected or {name: weight.double() for name, weight in weights.items()}
        step(held, number + 1)
        average.update(before, decay, torch.tensor(refused))
        now = held.module.trained()
        if not refused:
            expected = {name: decay * mean + (1 - decay) * now[name].double() for name, mean in expected.items()}
        found = averages(held)
        assert found.keys() == now.keys(), "a frozen parameter or a buffer has no average"
        for name, mean in found.items():
            assert mean.shape == now[name].shape
            torch.testing.assert_close(mean.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_a_refused_step_does_not_change_the_average():
    held = training()
    average = MovingAverage(held.fragments(), held.state)
    before = average.begin()
    step(held, 1)
    average.update(before, 0.5, torch.tensor(False))
    found = averages(held)
    average.update(average.begin(), 0.5, torch.tensor(True))
    assert all(torch.equal(mean, found[name]) for name, mean in averages(held).items())


def test_a_checkpoint_has_the_average_and_the_buffers_of_its_step(tmp_path: Path):
    held = training()
    average = MovingAverage(held.fragments(), held.state)
    saved = {}
    for number in (1, 2, 3):
        before = average.begin()
        step(held, number)
        average.update(before, 0.5, torch.tensor(False))
        if number == 2:
            saver = CheckpointSaver(held, lambda folder: folder.mkdir(), in_background=False)
            extra = {"run": {}, "config": {}, "precision": "no"}
            saver.save(tmp_path / "checkpoint-2", Position(2, 0, 0), {}, extra, None)
            saved = {**averages(held), "mean": torch.full((2,), 3.0), "count": torch.tensor(2)}
    again = training()
    with PieceReader(tmp_path / "checkpoint-2", read_manifest(tmp_path / "checkpoint-2")) as pieces:
        assert pieces.frozen_names() == ["count", "frozen", "mean"]
        load_state(again, pieces)
    found = {**averages(again), "mean": again.module.mean, "count": again.module.count}
    assert found.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in found.items())
    assert again.module.scratch.item() == 0.0, "a non-persistent buffer is not stored"
    average = MovingAverage(again.fragments(), again.state)
    assert average.begin() == {}, "a restored average would start again"
    step(again, 3)
    average.update({}, 0.5, torch.tensor(False))
    assert all(torch.equal(mean, averages(held)[name]) for name, mean in averages(again).items())
    assert torch.equal(again.module.mean, held.module.mean)
