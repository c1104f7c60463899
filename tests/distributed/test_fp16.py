"""fp16 training on a CPU with the loss scaling of torch and DeepSpeed, compared with fp32 steps of plain PyTorch."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_same_checkpoint
from corpus import TINY_MODEL
from ranks import cloze_ranks, run_ranks, succeed

from cloze.config import TrainConfig
from cloze.data.batches.layout import Layout
from cloze.errors import TrainingError

WORLD, MICRO_STEPS, LEARNING_RATE, DECAY, MAX_NORM = 2, 2, 0.1, 0.5, 1.0
SIZES = [0.1, math.inf, 0.1, 4.0, 0.1, 4.0, 4.0, math.inf]  # the factor of each step's loss; only rank 1 overflows
SKIPPED = [1, 7]
SAVED = 5  # the loss scale is saved after this step, between two steps that raise it
# Three good steps in a row raise the scale. Two more raise it again under DeepSpeed, three more with torch.
DEEPSPEED_SCALES = [1024, 512, 512, 512, 1024, 1024, 2048, 1024]
TORCH_SCALES = [1024, 512, 512, 512, 1024, 1024, 1024, 512]
FP16 = {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2, "hysteresis": 1}
ENGINES = ["ddp", "zero0", pytest.param("zero1", marks=pytest.mark.slow), "zero2", "zero3"]
State = dict[tuple[str, str, int], torch.Tensor]  # (parameter, kind, offset) -> [length], what a rank holds


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
    model.config = type("Config", (), {"hidden_size": 16, "get_text_config": lambda self: None})()
    return model


def share_of_loss(model: Any, step: int, micro_step: int, rank: int) -> torch.Tensor:
    """Return a micro-batch's share of a step's loss; the shares of all micro-batches and ranks add up to it."""
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + 10 * micro_step + rank))
    size = SIZES[step] if rank == 1 or math.isfinite(SIZES[step]) else 1.0
    return size * model(inputs.to(next(model.parameters()).dtype)).float().square().mean() / (WORLD * MICRO_STEPS)


def join(name: str) -> Any:
    """Join the ranks; return the Accelerator of an engine."""
    from deepspeed.accelerator import get_accelerator

    from cloze.distributed.world import RunShape, start

    # DeepSpeed refuses CPUs without fp16 instructions, although torch can compute in fp16 on them.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    settings = {"zero_optimization": {"stage": int(name[4:])}, "fp16": {**FP16}} if name.startswith("zero") else None
    return start(RunShape(True, "fp16", MICRO_STEPS, settings))


def make_engine(accelerator: Any, scale_power: int = 10) -> Any:
    from cloze.training.engines.choose_engine import engine_for
    from cloze.training.optim.optimizers import build_optimizer

    if accelerator.state.deepspeed_plugin is None:  # accelerate scales the loss on GPUs only
        accelerator.scaler = torch.amp.GradScaler("cpu", 2.0**scale_power, growth_interval=3)
        accelerator.native_amp = True
    else:
        accelerator.state.deepspeed_plugin.deepspeed_config["fp16"]["initial_scale_power"] = scale_power
    config = TrainConfig(output_dir="", optim="sgd", optim_args="momentum=0.9", weight_decay=0.0)
    model = make_model().eval()  # as `from_pretrained` returns it
    optimizer, _ = build_optimizer(model, config, offload=False)
    layout = Layout(8, MICRO_STEPS, accelerator.process_index, WORLD)
    return engine_for(accelerator).prepare(model, optimizer, layout, MAX_NORM)


def take_step(engine: Any, step: int) -> tuple[float, bool]:
    """Take a step; return the gradient norm and whether the step was skipped."""
    for micro_step in range(MICRO_STEPS):
        is_last = micro_step == MICRO_STEPS - 1
        with engine.forward_context(is_last):
            loss = share_of_loss(engine.model, step, micro_step, engine.accelerator.process_index)
            engine.backward(loss * WORLD, is_last)
    norm, refused = engine.step(LEARNING_RATE, DECAY)
    return float(norm), bool(refused)


def held(engine: Any) -> State:
    """Return this rank's weights, momentum and averages."""
    from cloze.checkpoint.format import WEIGHT
    from cloze.training.engines.sharded_state import tensor_keys

    state, found = engine.state, {}
    for fragment in engine.fragments():
        for key in [WEIGHT, *tensor_keys(fragment, state)]:
            found[fragment.name, key, fragment.offset] = fragment.view(key, state).detach().clone()
    return found


def record(name: str, folder: Path) -> None:
    """Take all steps on a rank, repeat the last ones with a restored loss scale, and write the results."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    accelerator = join(name)
    engine = make_engine(accelerator)
    assert engine.module.training
    exact = dict(make_model().named_parameters())
    for (parameter, _, offset), values in held(engine).items():
        assert torch.equal(values, exact[parameter].reshape(-1)[offset : offset + len(values)])  # not rounded to fp16
    steps = []
    for step in range(len(SIZES)):
        norm, skipped = take_step(engine, step)
        steps.append({"norm": norm, "skipped": skipped, "scale": engine.loss_scale_state(), "state": held(engine)})
    other, resumed = make_engine(accelerator, scale_power=4), []
    other.restore_loss_scale(json.loads(json.dumps(steps[SAVED]["scale"])))
    for step in range(SAVED + 1, len(SIZES)):
        take_step(other, step)
        resumed.append(other.loss_scale_state())
    found = {"steps": steps, "resumed": resumed, "error": None}
    if isinstance(scaler := getattr(getattr(other, "zero", None), "loss_scaler", None), DynamicLossScaler):
        scaler.cur_scale = scaler.min_scale
        try:
            take_step(other, SKIPPED[-1])
        except TrainingError as error:
            found["error"] = str(error)
    torch.save(found, folder / f"{accelerator.process_index}.pt")


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> str:
    """The engine of a test's ranks."""
    return request.param


@pytest.fixture(scope="module")
def ranks(engine: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank recorded with an engine."""
    folder = tmp_path_factory.mktemp(engine)
    succeed(run_ranks(record, WORLD, folder / "log", name=engine, folder=folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def whole(ranks: list[dict[str, Any]], step: int) -> dict[tuple[str, str], torch.Tensor]:
    """Return the state after a step, assembled from all ranks: (parameter, kind) -> all elements."""
    shapes = {key: value.numel() for key, value in make_model().named_parameters()}
    found: dict[tuple[str, str], torch.Tensor] = {}
    for rank in ranks:
        for (parameter, kind, offset), values in rank["steps"][step]["state"].items():
            full = found.setdefault((parameter, kind), torch.full((shapes[parameter],), math.nan))
            full[offset : offset + len(values)] = values
    return found


@functools.cache
def reference() -> tuple[list[float], list[dict[tuple[str, str], torch.Tensor]]]:
    """Return norms and states of the same steps in fp32 on one process, where skipped steps change nothing."""
    model = make_model()
    weights = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    norms, states = [], []
    for step in range(len(SIZES)):
        if step not in SKIPPED:
            optimizer.zero_grad()
            sum(share_of_loss(model, step, m, rank) for m in range(MICRO_STEPS) for rank in range(WORLD)).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
            optimizer.step()
            for name, weight in weights.items():
                average[name] += (1 - DECAY) * (weight.detach() - average[name])
        else:
            norms.append(math.inf)
        momentum = {name: optimizer.state[weight]["momentum_buffer"] for name, weight in weights.items()}
        kinds = {"weight": weights, "momentum_buffer": momentum, "ema": average}
        states.append(
            {(n, k): v.detach().reshape(-1).clone() for k, values in kinds.items() for n, v in values.items()}
        )
    return norms, states


def scales(states: list[dict[str, float]]) -> list[float]:
    return [state.get("scale", state.get("cur_scale")) for state in states]


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_a_step_that_overflows_on_one_rank_is_skipped_on_all_and_changes_nothing(ranks: list[dict[str, Any]]):
    for rank in ranks:
        assert [number for number, step in enumerate(rank["steps"]) if step["skipped"]] == SKIPPED
        for number in SKIPPED:
            before, after = rank["steps"][number - 1]["state"], rank["steps"][number]["state"]
            assert before.keys() == after.keys()
            assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_other_steps_match_fp32_even_if_the_scale_changes(ranks: list[dict[str, Any]]):
    """Gradient norms, weights, momentum and averages match, with and without clipping."""
    norms, states = reference()
    assert min(norms) < MAX_NORM / 2 < 2 * MAX_NORM < max(norm for norm in norms if math.isfinite(norm))
    for rank in ranks:
        found = [step["norm"] if number not in SKIPPED else math.inf for number, step in enumerate(rank["steps"])]
        assert found == pytest.approx(norms, rel=5e-3)
    for number, expected in enumerate(states):
        found = whole(ranks, number)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            change = value - states[number - 1][key] if number else value
            assert (found[key] - value).norm() <= 2e-3 * value.norm() + 0.05 * change.norm(), (number, key)


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_the_loss_scale_halves_at_a_skipped_step_and_doubles_after_enough_good_steps(
    engine: str, ranks: list[dict[str, Any]]
):
    expected = TORCH_SCALES if engine == "ddp" else DEEPSPEED_SCALES
    assert [scales([step["scale"] for step in rank["steps"]]) for rank in ranks] == [expected] * WORLD


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_a_restored_loss_scale_continues_as_if_the_run_had_not_stopped(ranks: list[dict[str, Any]]):
    for rank in ranks:
        assert rank["resumed"] == [step["scale"] for step in rank["steps"][SAVED + 1 :]]


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine not in ("ddp", "zero0")], indirect=True)
def test_an_overflow_at_the_smallest_scale_is_a_one_line_error_on_every_rank(ranks: list[dict[str, Any]]):
    for rank in ranks:
        assert "no gradient is finite at fp16's smallest loss scale; train in bf16" in rank["error"]
        assert "\n" not in rank["error"]


def fp16_on_a_cpu() -> None:
    """Allow `cloze train --fp16` on this rank without a GPU, with a loss scale that is too large at first."""
    from deepspeed.accelerator import get_accelerator

    from cloze.training import setup
    from cloze.training.engines import precision

    type(get_accelerator()).is_fp16_supported = lambda self: True
    precision._check_possible = lambda *_: None
    plain = setup.start

    def start(shape: Any) -> Any:
        accelerator = plain(shape)
        if accelerator.state.deepspeed_plugin is None:
            accelerator.scaler = torch.amp.GradScaler("cpu", 2.0**26, growth_interval=2)
            accelerator.native_amp = True
        return accelerator

    setup.start = start


@pytest.mark.parametrize(
    "engine",
    ["single", *(pytest.param(e, marks=pytest.mark.slow) for e in ("ddp", "zero0", "zero1", "zero2", "zero3"))],
)
def test_a_resumed_fp16_run_ends_with_the_same_bits_and_loss_scale(prepared: Path, tmp_path: Path, engine: str):
    """Steps are skipped before and after the checkpoint; position and learning rate count them."""
    flags = ["train", *TINY_MODEL, "--dataset_name", str(prepared), "--output_dir", str(tmp_path / "run"), "--fp16"]
    flags += ["--max_steps", "16", "--save_steps", "8", "--logging_steps", "1", "--learning_rate", "1e-3"]
    flags += ["--per_device_train_batch_size", "4", "--ema_decay", "0.9", "--optim", "sgd", "--eval_strategy", "no"]
    if engine.startswith("zero"):
        fp16 = FP16 | {"initial_scale_power": 26}
        settings = {"zero_optimization": {"stage": int(engine[4:])}, "fp16": fp16}
        (tmp_path / "ds.json").write_text(json.dumps(settings))
        flags += ["--deepspeed", str(tmp_path / "ds.json")]
    world = 1 if engine == "single" else WORLD
    launcher = "single" if engine == "single" else "ddp"
    succeed(cloze_ranks(flags, world, launcher, tmp_path / "a", fp16_on_a_cpu))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["step"] for line in lines if line["grad_norm"] is None]
    assert min(skipped) <= 8 < max(skipped)
    assert len(skipped) < 12
    assert [line["samples_seen"] for line in lines] == [4 * world * step for step in range(1, 17)]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3 * (1 - step / 16) for step in range(16)])
    (tmp_path / "run" / "checkpoint-16").rename(tmp_path / "checkpoint-16")
    resume = ["--resume_from_checkpoint", "auto"]
    succeed(cloze_ranks([*flags, *resume], world, launcher, tmp_path / "b", fp16_on_a_cpu))
    assert_same_checkpoint(tmp_path / "checkpoint-16", tmp_path / "run" / "checkpoint-16")
    one, other = (
        json.loads((folder / "checkpoint-16" / "checkpoint.json").read_text())
        for folder in (tmp_path, tmp_path / "run")
    )
    assert one["loss_scale"] == other["loss_scale"]
    assert one["precision"] == "fp16"
