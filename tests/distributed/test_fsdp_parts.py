"""How FSDP2 divides a model: the weights that every engine begins with, nothing kept whole, every architecture."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import TINY_MODEL_NO_DROPOUT
from ranks import Outcome, cloze_ranks, run_ranks, succeed
from test_architectures import _BERT, ARCHITECTURES, TINY
from test_archs_table import without_dropout

from cloze.model.archs import architectures

pytestmark = pytest.mark.slow
WIDE = "hidden_size=512,num_hidden_layers=8,num_attention_heads=8,intermediate_size=2048,vocab_size=607"


def divided(prepared: str, folder: str, overrides: str = WIDE) -> None:
    """What one rank does: divide a model that `build_model` made, and look at it."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    from torch.distributed.tensor import DTensor

    from cloze.config import TrainConfig
    from cloze.data.loader import Layout
    from cloze.distributed import RunShape, start
    from cloze.memory import PeakMemory, anonymous_memory, give_back
    from cloze.model.load import build_model
    from cloze.train import state
    from cloze.train.engine import prepare_engine
    from cloze.train.fsdp import clip_gradients
    from cloze.train.optim import build_optimizer

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
        engine = prepare_engine(accelerator, model, optimizer, Layout(4, 2, rank, world), 1.0)
    give_back()
    assert not any(one() is not None for one in alive), "a whole weight is still there"
    parts = dict(engine.module.named_parameters())
    assert all(isinstance(part, DTensor) and part.dtype == torch.float32 for part in parts.values())
    inner = state.inner_optimizer(engine.optimizer)
    assert {id(p) for group in inner.param_groups for p in group["params"]} == {id(p) for p in parts.values()}
    assert engine.module.get_input_embeddings().weight is engine.module.get_output_embeddings().weight

    covered = {name: torch.zeros(p.numel(), dtype=torch.int32) for name, p in expected.items()}
    for one in state.fragments(engine.module, engine.optimizer, rank):
        values = one.view(state.WEIGHT, inner.state)
        assert torch.equal(values, expected[one.name].reshape(-1)[one.offset : one.offset + one.length]), one.name
        covered[one.name][one.offset : one.offset + one.length] += 1
    for name, count in covered.items():
        torch.distributed.all_reduce(count)
        assert (count == 1).all(), name
        assert torch.equal(state.whole(parts[name]), expected[name]), name

    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        answers = engine.model(input_ids=ids).logits
    for name, part in engine.module.named_parameters():
        state.refresh_model(part, expected[name] * 0.5, rank)
    with torch.no_grad():
        assert not torch.equal(engine.model(input_ids=ids).logits, answers), "what was gathered is still there"

    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(p.shape, generator=generator) for name, p in expected.items()}
    for name, part in engine.module.named_parameters():
        part.grad = torch.zeros_like(part)
        state.refresh_model(part.grad, gradients[name], rank)
    norm = clip_gradients(list(engine.module.parameters()), 1.0)
    plain = [torch.nn.Parameter(value) for value in expected.values()]
    for parameter, gradient in zip(plain, gradients.values(), strict=True):
        parameter.grad = gradient
    assert abs(norm / torch.nn.utils.clip_grad_norm_(plain, 1.0) - 1) < 1e-6
    for name, part in engine.module.named_parameters():
        assert torch.allclose(state.whole(part.grad), gradients[name], rtol=1e-5), name
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
    assert found["peak"] < 4 * found["numel"] / world_size + 20e6


def test_parts_are_right_where_ranks_get_fewer_rows_or_none(prepared: Path, tmp_path: Path):
    sizes = "hidden_size=2,num_hidden_layers=1,num_attention_heads=1,intermediate_size=5,vocab_size=607"
    succeed(run_ranks(divided, 3, tmp_path / "log", prepared=str(prepared), folder=str(tmp_path), overrides=sizes))


def curve_of(prepared: Path, folder: Path, model_type: str, world: int, engine: str, *more: str) -> Any:
    """[2, 2]: loss and norm of two steps on the same four blocks each; the outcomes where it failed."""
    overrides = TINY.get(model_type, _BERT) + (",hash_seed=0" if model_type == "reformer" else "")
    argv = ["train", "--model_type", model_type, "--config_overrides", overrides, "--max_steps", "2"]
    argv += ["--logging_steps", "1", "--save_strategy", "no", "--learning_rate", "1e-3", "--output_dir"]
    argv += [str(folder / "run"), "--dataset_name", str(prepared), "--per_device_train_batch_size", str(4 // world)]
    outcomes: list[Outcome] = cloze_ranks([*argv, *more], world, engine, folder / "log", without_dropout)
    succeed(outcomes)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return np.array([[json.loads(line)[key] for key in ("loss", "grad_norm")] for line in lines])


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_trains_as_in_one_process(prepared: Path, tmp_path: Path, model_type: str, figure):
    """Recomputing activations where it can; in bf16 too where it can."""
    (said,) = architectures(model_type)
    recompute = ["--gradient_checkpointing"] if said.checkpointing else []
    alone = curve_of(prepared, tmp_path / "alone", model_type, 1, "single")
    two = curve_of(prepared, tmp_path / "two", model_type, 2, "fsdp2", *recompute)
    np.testing.assert_allclose(two, alone, rtol=1e-5)
    figure(
        "FSDP2, recomputing where it can be, against one process, 2 steps: loss and norm", abs(two / alone - 1).max()
    )
    if said.bf16:
        half = curve_of(prepared, tmp_path / "half", model_type, 2, "fsdp2", "--bf16")
        np.testing.assert_allclose(half[:, 0], alone[:, 0], rtol=1e-2)


@pytest.mark.parametrize("optim", ["sgd", "rmsprop", "adamw_torch"])
def test_other_optimizers_and_frozen_weights_and_averages_give_what_ddp_gives(prepared, tmp_path, optim: str):
    argv = ["train", *TINY_MODEL_NO_DROPOUT, "--max_steps", "4", "--logging_steps", "1", "--save_strategy", "no"]
    argv += ["--optim", optim, "--freeze", r".*(word_embeddings|layer\.0)", "--ema_decay", "0.9", "--dataset_name"]
    argv += [str(prepared), "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    found = {}
    for engine in ("ddp", "fsdp2"):
        succeed(cloze_ranks([*argv, "--output_dir", str(tmp_path / engine)], 2, engine, tmp_path / "log"))
        lines = map(json.loads, (tmp_path / engine / "metrics.jsonl").read_text().splitlines())
        found[engine] = np.array([(line["loss"], line["grad_norm"]) for line in lines])
    np.testing.assert_allclose(found["fsdp2"], found["ddp"], rtol=1e-5)


def test_muon_is_refused_in_one_line(prepared: Path, tmp_path: Path):
    argv = ["train", *TINY_MODEL_NO_DROPOUT, "--max_steps", "1", "--dataset_name", str(prepared), "--optim", "muon"]
    outcomes = cloze_ranks([*argv, "--output_dir", str(tmp_path / "run")], 2, "fsdp2", tmp_path / "log")
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert "--optim: muon needs whole parameters, which FSDP2 does not keep; train with DDP" in outcomes[0].output
    assert not (tmp_path / "run").exists()
