"""How FSDP2 divides a model: the weights that every engine begins with, nothing kept whole, every architecture."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from ranks import run_ranks, succeed
from small_models import build, first_batch, loss_and_gradients, without_dropout

from cloze.data.batches.masking import IGNORE_INDEX
from cloze.model.archs import GATHERED_AS_ONE, architectures, decoder_start
from cloze.model.packed import model_inputs
from cloze.model.sparse_head import MaskedHead
from cloze.model.trained import freeze_unused
from cloze.training.loss import masked_loss_sum
from cloze.training.prepare_model import enable_checkpointing

pytestmark = pytest.mark.slow
WIDE = "hidden_size=512,num_hidden_layers=8,num_attention_heads=8,intermediate_size=2048,vocab_size=607"


def divided(prepared: str, folder: str, overrides: str = WIDE) -> None:
    """What one rank does: divide a model that `build_model` made, and look at it."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    from torch.distributed.tensor import DTensor

    from cloze.checkpoint.format import WEIGHT
    from cloze.config import TrainConfig
    from cloze.data.batches.layout import Layout
    from cloze.distributed.world import RunShape, start
    from cloze.model.load import build_model
    from cloze.training.engines.choose_engine import engine_for
    from cloze.training.engines.gradients import gradient_norm
    from cloze.training.optim.optimizers import build_optimizer
    from cloze.utils.memory import PeakMemory, anonymous_memory, give_back

    config = TrainConfig(dataset_name="x", output_dir="y", model_type="roberta", config_overrides=overrides)
    accelerator = start(RunShape(use_cpu=True, precision="no"))
    give_back()
    before = anonymous_memory()
    model, _ = build_model(config, Path(prepared) / "tokenizer", 32, seed=5)
    give_back()
    whole_bytes = anonymous_memory() - before
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    alive = [weakref.ref(parameter) for parameter in model.parameters()]
    optimizer, _ = build_optimizer(model, config, offload=False)
    rank, world = accelerator.process_index, accelerator.num_processes
    with PeakMemory() as peak:
        engine = engine_for(accelerator).prepare(model, optimizer, Layout(4, 2, rank, world), 1.0)
    give_back()
    assert not any(one() is not None for one in alive), "a whole weight is still there"
    parts = dict(engine.module.named_parameters())
    assert all(isinstance(part, DTensor) and part.dtype == torch.float32 for part in parts.values())
    inner = engine.inner
    assert {id(p) for group in inner.param_groups for p in group["params"]} == {id(p) for p in parts.values()}
    assert engine.module.get_input_embeddings().weight is engine.module.get_output_embeddings().weight

    covered = {name: torch.zeros(p.numel(), dtype=torch.int32) for name, p in expected.items()}
    for one in engine.fragments():
        values = one.view(WEIGHT, inner.state)
        assert torch.equal(values, expected[one.name].reshape(-1)[one.offset : one.offset + one.length]), one.name
        covered[one.name][one.offset : one.offset + one.length] += 1
    for name, count in covered.items():
        torch.distributed.all_reduce(count)
        assert (count == 1).all(), name
        assert torch.equal(engine.whole(parts[name]), expected[name]), name

    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        answers = engine.model(input_ids=ids).logits
    for name, part in engine.module.named_parameters():
        engine.refresh(part, expected[name] * 0.5)
    with torch.no_grad():
        assert not torch.equal(engine.model(input_ids=ids).logits, answers), "what was gathered is still there"

    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(p.shape, generator=generator) for name, p in expected.items()}
    for name, part in engine.module.named_parameters():
        part.grad = torch.zeros_like(part)
        engine.refresh(part.grad, gradients[name])
    norm = gradient_norm(list(engine.module.parameters()), divided=True)
    torch.nn.utils.clip_grads_with_norm_(engine.module.parameters(), 1.0, norm)
    exact = sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5
    assert float(norm) == pytest.approx(exact, rel=1e-7)
    for gradient in gradients.values():
        gradient.mul_(1 / (exact + 1e-6))
    for name, part in engine.module.named_parameters():
        assert torch.allclose(engine.whole(part.grad), gradients[name], rtol=1e-5), name
    figures = {"whole": whole_bytes, "peak": peak.grown, "numel": sum(p.numel() for p in expected.values())}
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(figures))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parts_are_those_of_the_weights_that_every_engine_begins_with(prepared, tmp_path, world_size: int, figure):
    """Also: whole weights are let go of, gathered ones do not outlive a forward, norms are those of the whole."""
    succeed(run_ranks(divided, world_size, tmp_path / "log", prepared=str(prepared), folder=str(tmp_path)))
    found = json.loads((tmp_path / "rank-0.json").read_text())
    figure(f"FSDP2 on {world_size} ranks, dividing {found['numel'] / 1e6:.0f} M parameters: MB above the whole model",
           found["peak"] / 1e6)  # fmt: skip
    assert found["peak"] < 4 * found["numel"] / 2, "a second copy of the model"


def test_parts_are_right_where_ranks_get_fewer_rows_or_none(prepared: Path, tmp_path: Path):
    sizes = "hidden_size=2,num_hidden_layers=1,num_attention_heads=1,intermediate_size=5,vocab_size=607"
    succeed(run_ranks(divided, 3, tmp_path / "log", prepared=str(prepared), folder=str(tmp_path), overrides=sizes))


def every_architecture(prepared: str, folder: str, precision: str) -> None:
    """What one rank does: for all architectures, loss and norm of one step alone and divided, one model after another;
    it writes what it found, or why there is nothing."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    from cloze.config import TrainConfig
    from cloze.data.batches.layout import Layout
    from cloze.distributed.world import RunShape, start
    from cloze.training.engines.choose_engine import engine_for
    from cloze.training.engines.fsdp2 import units
    from cloze.training.optim.optimizers import build_optimizer

    without_dropout()
    accelerator = start(RunShape(use_cpu=True, precision=precision))
    batch, config, found = first_batch(Path(prepared)), TrainConfig(dataset_name="x", output_dir="y"), {}
    for said in (one for name in ARCHITECTURES for one in architectures(name)):
        if precision == "bf16" and not said.bf16:
            continue
        model = build(Path(prepared), said.model_type)
        head = MaskedHead(model)
        freeze_unused(model, batch["input_ids"].numpy())
        loss, gradients = loss_and_gradients(model, batch, head)
        model.zero_grad(set_to_none=True)
        norm = float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())
        layers = len(units(model))
        if said.checkpointing:
            enable_checkpointing(model)
        try:  # as in a run of training: what is wrong with one must not hide the others
            optimizer, _ = build_optimizer(model, config, offload=False)
            layout = Layout(4, 2, accelerator.process_index, accelerator.num_processes)
            engine = engine_for(accelerator).prepare(model, optimizer, layout, 0.0)
            found[said.model_type] = [loss, norm, *step_of(engine, head, batch), layers]
        except Exception as error:
            found[said.model_type] = f"{type(error).__name__}: {error}"
            torch.distributed.barrier()
    (Path(folder) / f"rank-{accelerator.process_index}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def step_of(engine: Any, head: MaskedHead, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Loss and norm of one step in two micro-batches, both of them all of `batch`, on every rank."""
    inputs = model_inputs(batch, torch.device("cpu"), None, decoder_start(engine.module.config))
    count = (batch["targets"] != IGNORE_INDEX).sum()
    for is_last in (False, True):
        torch.manual_seed(5)
        with engine.forward_context(is_last):
            loss = masked_loss_sum(head.logits(engine.model, inputs, batch["positions"]), batch["targets"]) / count
            engine.backward(loss / 2, is_last)
    norm, refused = engine.step(1e-3)
    assert not refused
    return float(loss), float(norm)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-5), ("bf16", 1e-2)])
def test_every_architecture_has_the_loss_of_one_process(prepared, tmp_path, precision: str, tolerance: float, figure):
    """Two ranks, two micro-batches, activations recomputed where they can be; in fp32 the norm of the gradient too."""
    how = {"prepared": str(prepared), "folder": str(tmp_path), "precision": precision}
    succeed(run_ranks(every_architecture, 2, tmp_path / "log", timeout=1500, **how))
    found = json.loads((tmp_path / "rank-0.json").read_text())
    assert {name: why for name, why in found.items() if isinstance(why, str)} == {}
    assert {name for name, (*_, layers) in found.items() if not layers} == GATHERED_AS_ONE
    apart = {name: abs(two / one - 1) for name, (one, _, two, _, _) in found.items()}
    norms = {name: abs(two / one - 1) for name, (_, one, _, two, _) in found.items()}
    assert {name: value for name, value in apart.items() if value > tolerance} == {}
    figure(f"FSDP2, {len(found)} architectures in {precision}, against one process: loss", max(apart.values()))
    if precision == "no":
        assert {name: value for name, value in norms.items() if value > tolerance} == {}
        figure(f"FSDP2, {len(found)} architectures, against one process: norm of the gradient", max(norms.values()))
