"""Scores at masked positions only: the loss, the gradients and the curve of the dense way, for every architecture."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from architectures import ALWAYS, ARCHITECTURES
from small_models import build, first_batch, loss_and_gradients
from torch._dynamo.utils import counters

from cloze.data.batches.make_batch import fixed_capacity
from cloze.data.batches.masking import IGNORE_INDEX
from cloze.model.sparse_head import MaskedHead, check_head
from cloze.training.loss import masked_loss_sum


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=() if t in ALWAYS else pytest.mark.slow) for t in ARCHITECTURES]
)
def test_loss_and_gradients_are_those_of_the_dense_way(prepared: Path, model_type: str, figure):
    model = build(prepared, model_type)
    batch, padded = first_batch(prepared), first_batch(prepared, capacity=64)
    assert len(padded["positions"]) > len(batch["positions"])
    dense_loss, dense = loss_and_gradients(model, batch, None)
    head = MaskedHead(model)
    assert head.sparse
    norm = torch.stack([g.double().norm() for g in dense.values()]).norm()
    for one in (batch, padded):
        loss, gradients = loss_and_gradients(model, one, head)
        assert abs(loss / dense_loss - 1) < 1e-5
        assert gradients.keys() == dense.keys()
        difference = torch.stack([(gradients[n] - dense[n]).double().norm() for n in dense]).norm() / norm
        assert difference < 1e-5
        figure("sparse against dense head: loss", abs(loss / dense_loss - 1))
        figure("sparse against dense head: gradient", difference)


def test_a_batch_without_a_masked_token_has_no_loss_and_no_gradient(prepared: Path):
    model, batch = build(prepared, "roberta"), first_batch(prepared)
    batch |= {"positions": torch.zeros(8, dtype=torch.int64), "targets": torch.full((8,), IGNORE_INDEX)}
    inputs = {"input_ids": batch["input_ids"]}
    loss = masked_loss_sum(MaskedHead(model).logits(model, inputs, batch["positions"]), batch["targets"])
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_more_masked_tokens_than_the_capacity_are_all_predicted(prepared: Path):
    assert fixed_capacity(8 * 128, 0.15) == 256
    assert fixed_capacity(32, 1.0) == 32
    small, usual = first_batch(prepared, capacity=8), first_batch(prepared)
    real = small["targets"] != IGNORE_INDEX
    assert int(real.sum()) == int((usual["labels"] != IGNORE_INDEX).sum())
    assert int(real.sum()) > 8
    assert (usual["labels"].flatten()[small["positions"][real]] == small["targets"][real]).all()


class MixingHead(torch.nn.Module):
    """A head whose rows depend on each other."""

    def __init__(self, plain: torch.nn.Module):
        super().__init__()
        self.plain = plain

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.plain(hidden + hidden.mean(dim=1, keepdim=True))


def test_a_head_that_mixes_rows_is_noticed_and_goes_the_dense_way(prepared: Path, capsys):
    model, batch = build(prepared, "roberta"), first_batch(prepared)
    model.lm_head = MixingHead(model.lm_head)
    dense_loss, _ = loss_and_gradients(model, batch, None)
    head = MaskedHead(model)
    assert abs(loss_and_gradients(model, batch, head)[0] / dense_loss - 1) > 1e-4
    check_head(head, model, {"input_ids": batch["input_ids"]}, "no")
    assert not head.sparse
    assert "all positions go through the head" in capsys.readouterr().err
    assert abs(loss_and_gradients(model, batch, head)[0] / dense_loss - 1) < 1e-6


@pytest.mark.parametrize(
    ("model_type", "backend"),
    [
        *((model_type, "aot_eager") for model_type in ("bert", "roberta", "modernbert")),
        pytest.param("roberta", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_it_is_one_graph_with_the_loss_and_gradients_of_the_dense_way(
    prepared: Path, model_type: str, backend: str, figure
):
    """No graph break for the families that most people train, with a fixed capacity no second compilation, and the
    numbers of the plain model with torch's own mean, which is neither sparse nor compiled."""
    if backend == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler on a CPU, and there is none here")
    torch._dynamo.reset()
    model = build(prepared, model_type)
    batches = [first_batch(prepared, capacity=64, global_step=step) for step in range(3)]
    expected = [loss_and_gradients(model, batch, None) for batch in batches]
    head = MaskedHead(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    counters.clear()
    for batch, (dense_loss, dense) in zip(batches, expected, strict=True):
        assert len(batch["positions"]) == 64
        model.zero_grad(set_to_none=True)
        logits = head.logits(compiled, {"input_ids": batch["input_ids"]}, batch["positions"])
        loss = masked_loss_sum(logits, batch["targets"]) / (batch["targets"] != IGNORE_INDEX).sum()
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == dense.keys()
        norm = torch.stack([g.double().norm() for g in dense.values()]).norm()
        apart = torch.stack([(gradients[n] - dense[n]).double().norm() for n in dense]).norm() / norm
        figure(f"sparse and compiled ({backend}) against dense head: loss", abs(float(loss) / dense_loss - 1))
        figure(f"sparse and compiled ({backend}) against dense head: gradient", apart)
        assert abs(float(loss) / dense_loss - 1) < 1e-5
        assert apart < 1e-5
    assert counters["stats"]["unique_graphs"] == 1
